"""Stages that are trained: samples pass up through them, one module on the device at a time, and nothing is cached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layerwise.config import Config
from layerwise.data.batches import Batch
from layerwise.memory.device import autocast, on_device
from layerwise.memory.meter import uncounted
from layerwise.nets.copying import copied
from layerwise.nets.module import Module
from layerwise.training.caching import rounded
from layerwise.training.checkpoint import Arrays, load_weights
from layerwise.training.plan import StagePlan


@dataclass(frozen=True, slots=True)
class Handing:
    """How a stage hands its outputs to what stands above it."""

    precision: str
    """Of the pass that works them out."""
    dtype: str | None
    """Of the cache that they were trained to be read from; None where nothing lay between, so nothing is rounded."""

    @staticmethod
    def of(config: Config) -> "Handing":
        """Of a stage that was trained with these options. int8 is not rounded: its scales are those of 1000 rows."""
        return Handing(config.training.precision, config.cache.dtype)


@dataclass(frozen=True, slots=True)
class FrozenStage:
    """A stage that is trained no more."""

    stage: int
    module: Module
    """In host memory."""
    handing: Handing

    def handed_over(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rounded as a cache would have rounded them. Raises TrainingError where its dtype cannot hold them."""
        return outputs if self.handing.dtype is None else rounded(outputs, self.handing.dtype, self.stage)


def pass_up(
    stages: Sequence[FrozenStage], batch: Batch, states: list[Any] | None, last: bool, device: torch.device
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """What each stage hands over, lowest first: frames (B, L, *frame shape) on the device, and int64 [B] real lengths.

    states: one for each stage where the batch is the next piece of one sample, None before its first and brought up to
    date here; last: whether it ends the sample. None where samples lie side by side.
    """
    frames, lengths = on_device(batch.frames, device), batch.lengths
    for number, stage in enumerate(stages):
        module = copied(stage.module, device)
        with torch.no_grad(), autocast(device, stage.handing.precision):
            if states is None:
                frames = module(frames.float(), lengths)[1]
                lengths = module.out_length(lengths)
            else:
                frames, states[number] = module.push(frames.float(), states[number], last)
                lengths = np.array([frames.shape[1]])
            del module
            frames = stage.handed_over(frames)
        yield frames, lengths


def untrained_stages(plans: Sequence[StagePlan], handings: Sequence[Handing], seed: int) -> list[FrozenStage]:
    """With the weights that training with this seed begins with; their host memory does not count for the device."""
    with uncounted():
        modules = [plan.build_module(seed, torch.device("cpu")).eval() for plan in plans]
    return [
        FrozenStage(plan.stage, module, handing) for plan, module, handing in zip(plans, modules, handings, strict=True)
    ]


def trained_stages(plans: Sequence[StagePlan], handings: Sequence[Handing], weights: Arrays) -> list[FrozenStage]:
    """weights: of all their layers, by the names that these have in the whole network; others are passed over."""
    stages = untrained_stages(plans, handings, 0)
    with uncounted():
        for stage in stages:
            load_weights(stage.module, {name: weights[name] for name in stage.module.state_dict()})
    return stages

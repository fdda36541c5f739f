"""Small runs of every kind, on whichever device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from layerwise.config import OWN, Config, resolve
from layerwise.data.batches import Batch
from layerwise.data.open import as_data
from layerwise.data.source import DataSet
from layerwise.engines.run import RunResult, UserObjects, run
from layerwise.events import EpochDone, Event, Notify, StepDone, silent
from layerwise.memory.meter import meter_for
from layerwise.memory.plan import MemoryPlan
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network
from layerwise.stop import StopFlag
from layerwise.training.budget import allowed_plans
from layerwise.training.context import RunContext
from layerwise.training.cut import cut_network
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import StageTrainer, StepRandomness

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
WAVES = [(RNG.standard_normal((200 + 40 * n, 1), dtype=np.float32), f"kind {n % 2}") for n in range(10)]
"""Streams of different lengths, one channel."""
PICTURES = [(Image.fromarray(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)), f"kind {n % 2}") for n in range(10)]

SPEECH = {
    "net.name": "speech",
    "net.width": 8,
    "net.context": 8,
    "net.kernels": [10, 8],
    "net.strides": [5, 4],
    "net.paddings": [2, 2],
    "data.frames": "steps",
    "data.window": 160,
}
PATCHES = {
    "net.name": "vision",
    "net.width": 4,
    "net.blocks": [1, 1],
    "net.stem_stride": 2,
    "data.frames": "patches",
    "data.picture": 16,
    "data.crop": 16,
    "data.patch": 8,
    "data.patch_stride": 4,
    "data.gray": False,
    "objective.skip": 0,
}
WHOLE = {
    "net.name": OWN,
    "data.frames": "whole",
    "data.picture": 8,
    "data.gray": False,
    "objective.name": "ntxent",
    "data.views": 2,
}
EVERYWHERE: dict[str, Any] = {
    "data.source": OWN,
    "objective.steps": 2,
    "objective.negatives": 4,
    "objective.anchors": 8,
    "training.batch_size": 4,
    "training.max_epochs": 1,
    "training.lr": 1e-3,
    "memory.flops_per_byte": 16,
    "memory.micro_batch": 4,
    "memory.recompute": "never",
    "memory.optimizer": "device",
    "cache.block": "4kB",
    "cache.keep": "all",
}
"""Whole batches, unless a case says another layout: plans are looked for the longest."""
ANY_LAYOUT = {"memory.micro_batch": None, "memory.recompute": "auto", "memory.optimizer": "auto"}


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3, stride=2)
    )


class Reading(nn.Module):
    """Attention, normalisation and recurrence over the channels of a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.memory = nn.LSTM(12, 6, 2, batch_first=True, dropout=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.embed(x.mean(1)))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.memory(y)[0].mean(1)


def reading() -> nn.Module:
    torch.manual_seed(0)
    return Reading()


@dataclass(frozen=True)
class Case:
    """What is trained."""

    options: dict[str, Any]
    network: Callable[[], nn.Module] | None = None
    cut: tuple[int, ...] | None = None


SUPERVISED = {"objective.name": "supervised", "objective.label": "label"}
NO_RECURRENCE = {"net.context": 0}
CASES = {
    "speech": Case(SPEECH),
    "one stage, recomputed, micro-batches": Case(
        SPEECH | {"objective.projection": 4, "memory.recompute": "always", "memory.micro_batch": 2}, cut=(3,)
    ),
    "smallest, bfloat16": Case(
        SPEECH
        | {"memory.optimizer": "host", "memory.micro_batch": 1}
        | {"training.precision": "bfloat16", "cache.dtype": "bfloat16"}
    ),
    "hinge, float16, noise": Case(
        SPEECH
        | NO_RECURRENCE
        | {"objective.name": "hinge", "training.precision": "float16"}
        | {"training.input_noise": 0.2, "training.frame_dropout": 0.2}
    ),
    "ntxent, not cached": Case(
        SPEECH | NO_RECURRENCE | {"objective.name": "ntxent", "data.views": 2, "cache.policy": "never"}
    ),
    "supervised, rounds": Case(
        SPEECH | NO_RECURRENCE | SUPERVISED | {"training.rounds": 2, "training.max_epochs": 2, "cache.dtype": "int8"}
    ),
    "patches": Case(PATCHES),
    "whole, own network": Case(WHOLE | {"objective.cells": 2}, convolutions, (3, 2)),
    "whole, own network that reads, supervised": Case(WHOLE | SUPERVISED, reading, None),
    "whole, first weights from the data": Case(
        WHOLE
        | {"net.name": "convnet", "net.width": 8, "net.blocks": [1, 1], "data.picture": 48}
        | {"objective.name": "infonce+ntxent", "objective.cells": 8, "training.cosine": True}
    ),
    "simultaneous": Case(SPEECH | {"training.schedule": "simultaneous"}),
    "simultaneous, own network, hinge": Case(
        PATCHES | {"net.name": OWN, "training.schedule": "simultaneous", "objective.name": "hinge"},
        convolutions,
        (2, 3),
    ),
}


@dataclass(frozen=True, eq=False)
class Task:
    """One stage of a case."""

    config: Config
    spec: StageSpec

    @classmethod
    def of(cls, case: Case, stage: int, **changes: Any) -> "Task":
        config, data, network = opened(case, **changes)
        return cls(config, cut_network(config, data, CPU, network, case.cut)[stage - 1])

    @property
    def plans(self) -> list[MemoryPlan]:
        """All that its options allow."""
        return [plan for family in allowed_plans(self.config, self.spec) for plan in family]

    def batch(self) -> Batch:
        """Of noise; one sample is shorter than the others."""
        size, window = self.config.training.batch_size, self.spec.window
        frames = torch.randn(size, window.frames, *self.spec.frame_shape, generator=torch.Generator().manual_seed(1))
        lengths = np.full(size, window.frames)
        lengths[1] = max(window.frames // 2 // window.columns, 1) * window.columns
        frames[1, lengths[1] :] = 0
        return Batch(frames, lengths, np.array([0, 1, -1, 1]))

    def trainer(self, plan: MemoryPlan, device: torch.device) -> StageTrainer:
        """With its first weights."""
        return StageTrainer(self.spec, self.config, plan, RunContext(device, meter_for(device, None)))

    def steps(self, plan: MemoryPlan, device: torch.device) -> dict[str, Any]:
        """Losses, as numbers, and weights, as bytes, of two steps and a held-out score."""
        trainer = self.trainer(plan, device)
        with trainer.context.meter:
            batch = self.batch()
            if device.type == "cuda":
                batch = replace(batch, frames=batch.frames.pin_memory())
            scores = [trainer.train(batch, _randomness(0)), trainer.train(batch, _randomness(1))]
            scores.append(trainer.evaluate(batch, _randomness(2)))
            tensors = {**trainer.module.state_dict(), **trainer.objective.state_dict()}
            return {
                "losses": [(score.loss.item(), score.accuracy.item()) for score in scores],
                "weights": {name: tensor.cpu().numpy().tobytes() for name, tensor in tensors.items()},
            }


def _randomness(number: int) -> StepRandomness:
    return StepRandomness(partial(np.random.default_rng, number), seed=number)


def opened(case: Case, **changes: Any) -> tuple[Config, DataSet, Network | None]:
    """What the case trains, and on which data; changes: further options."""
    config = resolve(overrides={**EVERYWHERE, **case.options, **changes})
    data = as_data(WAVES if config.data.frames == "steps" else PICTURES, config.data)
    return config, data, traced_network(case.network(), tuple(data.frame_shape)) if case.network else None


def run_case(
    case: Case,
    device: str,
    folder: Path,
    notify: Notify = silent,
    stop: StopFlag | None = None,
    **changes: Any,
) -> RunResult:
    """Runs it in this folder; changes: further options."""
    places = {"training.device": device, "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
    config, data, network = opened(case, **places, **changes)
    return run(config, UserObjects(network, case.cut, data), notify=notify, stop=stop)


def outcome(case: Case, device: str, folder: Path) -> dict[str, Any]:
    """Weights, as bytes, and losses of a run in this folder."""
    losses: list[Any] = []

    def note(event: Event) -> None:
        if isinstance(event, StepDone | EpochDone):
            losses.append((event.stage, event.loss, event.accuracy))

    result = run_case(case, device, folder, note)
    return {
        "weights": {name: value.tobytes() for name, value in load_file(result.paths.encoder).items()},
        "losses": losses,
    }

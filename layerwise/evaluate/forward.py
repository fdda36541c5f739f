"""Features of samples that pass through trained or random stages from the data on, under the run's budget.

Each group of samples passes through every stage before the next group is read, with one module on the device at a time, so
nothing is cached and the device holds no more than in the caching pass.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.config import Config
from layerwise.data.batches import Batch, Group, group_renderings, read_ahead, read_piece
from layerwise.data.source import DataSet
from layerwise.errors import BudgetError
from layerwise.evaluate.examples import FeatureRows
from layerwise.evaluate.features import SampleSummary, choose_frames
from layerwise.evaluate.targets import ProbeTask
from layerwise.memory.device import cap, find_device, release, why_out_of_memory
from layerwise.memory.meter import meter_for, metered
from layerwise.stop import StopFlag
from layerwise.training.context import RunContext
from layerwise.training.forward import (
    SHORTEST,
    InferenceStage,
    forward_stages,
    longest_piece_of_samples,
    should_meter_group,
)


def features_under_budget(
    config: Config, question: ProbeTask, stages: Sequence[InferenceStage], folder: Path, stop: StopFlag
) -> tuple[list[FeatureRows], int]:
    """Features of each stage, in files in the folder, and the bytes on the device that they took.

    Raises BudgetError where --gpu-mem does not hold even short pieces.
    """
    device, budget, data = find_device(config.training.device), config.memory.gpu_mem, question.data
    cap(device, budget)
    piece = longest_piece_of_samples(config, data)
    while True:
        context = RunContext(device, meter_for(device, budget), stop)
        files = [FeatureRows(folder) for _ in stages]
        try:
            with context.meter:
                passed_features(stages, data, question.samples, piece, question.per_frame, files, context)
            return files, context.meter.peak
        except (BudgetError, RuntimeError) as error:
            reason = why_out_of_memory(error)
        if piece <= SHORTEST * data.columns:
            raise BudgetError(
                f"The run's --gpu-mem of {budget} bytes cannot hold the probe: {reason} Start the run again with a larger "
                "--gpu-mem, which changes nothing else, and probe then."
            )
        piece //= 2
        release(device)


def passed_features(
    stages: Sequence[InferenceStage],
    data: DataSet,
    samples: np.ndarray,
    piece: int,
    per_frame: bool,
    into: list[FeatureRows],
    context: RunContext,
) -> None:
    """For each stage: a row for each sample, or one per chosen frame where per_frame; view 0, in the samples' order.

    stages: the first ones; into: a file for each; piece: most input frames on the device at once. Raises Interrupted
    between two groups.
    """
    groups = group_renderings(data.lengths[samples], piece)
    chosen = _PlainView(data, samples)
    pieces = read_ahead(partial(read_piece, chosen, group, start) for group in groups for start in group.starts)
    for group in groups:
        context.stop.raise_if_set("while probing")
        numbers = samples[group.first : group.stop]
        summaries = _summaries(stages, data.lengths[numbers], numbers, per_frame)
        with metered(should_meter_group(context.meter, group)):
            _pass(stages, group, pieces, summaries, context.device)
        for file, of_group in zip(into, summaries, strict=True):
            for summary in of_group:
                file.append(summary.features(per_frame))


class _PlainView:
    """View 0 of some samples, as a source of its own."""

    views = 1

    def __init__(self, data: DataSet, samples: np.ndarray) -> None:
        self._data, self._samples = data, samples
        self.lengths, self.columns = data.lengths[samples], data.columns

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        return self._data.read(int(self._samples[sample]), start, stop)


def _summaries(
    stages: Sequence[InferenceStage], lengths: np.ndarray, samples: np.ndarray, per_frame: bool
) -> list[list[SampleSummary]]:
    """Empty summaries for each stage and each sample."""
    summaries = []
    for stage in stages:
        lengths = stage.module.out_length(lengths)
        summaries.append(
            [
                SampleSummary(choose_frames(sample, length, per_frame))
                for sample, length in zip(samples.tolist(), lengths.tolist(), strict=True)
            ]
        )
    return summaries


def _pass(
    stages: Sequence[InferenceStage],
    group: Group,
    pieces: Iterator[Batch],
    summaries: list[list[SampleSummary]],
    device: torch.device,
) -> None:
    states: list[Any] | None = [None] * len(stages) if group.streamed else None
    for start in group.starts:
        handed_over = forward_stages(stages, next(pieces), states, group.is_last(start), device)
        for of_stage, (frames, lengths) in zip(summaries, handed_over, strict=True):
            for summary, sample, length in zip(of_stage, frames, lengths.tolist(), strict=True):
                summary.add(sample[:length])

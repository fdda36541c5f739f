"""Features of samples that pass through all stages from the data on, with trained or with random weights.

Each group of samples passes through every stage before the next is read, one module on the device at a time, so nothing
is cached and the device holds no more than in the caching pass.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from layerwise.data.batches import Batch, read_ahead
from layerwise.data.groups import Group, group_renderings, read_piece
from layerwise.data.source import DataSet
from layerwise.evaluate.feature_rows import FeatureRows
from layerwise.evaluate.features import SampleSummary, choose_frames
from layerwise.memory.device import on_device
from layerwise.nets.copying import copied
from layerwise.nets.module import Module
from layerwise.stop import StopFlag


def passed_features(
    modules: list[Module],
    data: DataSet,
    samples: np.ndarray,
    piece: int,
    per_frame: bool,
    into: list[FeatureRows],
    device: torch.device,
    stop: StopFlag,
) -> None:
    """For each module: a row for each sample, or one per chosen frame where per_frame; view 0, in the samples' order.

    modules: those of the first stages, in host memory; into: a file for each; piece: most input frames on the device at
    once. Raises Interrupted between two groups.
    """
    groups = group_renderings(data.lengths[samples], piece)
    chosen = _PlainView(data, samples)
    pieces = read_ahead(partial(read_piece, chosen, group, start) for group in groups for start in group.starts)
    with torch.no_grad():
        for group in groups:
            stop.raise_if_set("while probing")
            numbers = samples[group.first : group.stop]
            summaries = _summaries(modules, data.lengths[numbers], numbers, per_frame)
            _pass(modules, group, pieces, summaries, device)
            for file, of_group in zip(into, summaries, strict=True):
                for summary in of_group:
                    file.append(summary.features(per_frame))


class _PlainView:
    """View 0 of some samples, as a source of its own."""

    views = 1

    def __init__(self, data: DataSet, samples: np.ndarray) -> None:
        self._data, self._samples = data, samples
        self.lengths = data.lengths[samples]

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        return self._data.read(int(self._samples[sample]), start, stop)


def _summaries(
    modules: list[Module], lengths: np.ndarray, samples: np.ndarray, per_frame: bool
) -> list[list[SampleSummary]]:
    """Empty summaries for each stage and each sample."""
    summaries = []
    for module in modules:
        lengths = module.out_length(lengths)
        summaries.append(
            [
                SampleSummary(choose_frames(sample, length, per_frame))
                for sample, length in zip(samples.tolist(), lengths.tolist(), strict=True)
            ]
        )
    return summaries


def _pass(
    modules: list[Module],
    group: Group,
    pieces: Iterator[Batch],
    summaries: list[list[SampleSummary]],
    device: torch.device,
) -> None:
    states: list[list[object] | None] = [None] * len(modules)
    for start in group.starts:
        batch = next(pieces)
        frames, lengths = on_device(batch.frames, device), batch.lengths
        for stage, on_host in enumerate(modules):
            module = copied(on_host, device)
            if group.streamed:
                frames, states[stage] = module.push(frames, states[stage], group.is_last(start))
                lengths = np.array([frames.shape[1]])
            else:
                _, frames = module(frames, lengths)
                lengths = module.out_length(lengths)
            del module
            for summary, sample, length in zip(summaries[stage], frames, lengths.tolist(), strict=True):
                summary.add(sample[:length])

"""Samples on their way through all stages, one module on the device at a time and no more frames than a piece.

Nothing is cached; between two stages the frames are rounded as the run's caches round them, because that is what the upper
stages were trained on: a file then gives the features that the run has cached for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from layerwise.cache.stored import as_array
from layerwise.config import Config
from layerwise.data.batches import Batch, collate, read_ahead
from layerwise.data.groups import Group, group_renderings
from layerwise.data.source import DataSet
from layerwise.errors import DataError
from layerwise.memory.device import autocast, on_device
from layerwise.nets.copying import copied
from layerwise.nets.module import Module
from layerwise.training.caching import rounded


@dataclass(frozen=True, slots=True)
class Passed:
    """What has become of a sample, or of the next piece of it."""

    sample: int
    rows: np.ndarray | None
    """[n, *frame shape] as a cache holds them, bfloat16 and int8 as float32; None where the file cannot be read."""
    last: bool
    fault: str = ""
    """Why not."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A piece of each sample of a group that can be read."""

    samples: list[int]
    batch: Batch | None
    """None where there is none."""
    faults: dict[int, str]
    """Number of a sample to why it cannot be read."""


def pass_through(
    modules: Sequence[Module], data: DataSet, first: int, piece: int, config: Config, device: torch.device
) -> Iterator[Passed]:
    """Samples `first` on, in their order, with what the last module puts out.

    modules: in host memory, lowest first; piece: most input frames on the device at once; config: that of their run.
    Raises TrainingError where an output does not fit into the dtype of the run's caches.
    """
    groups = [
        replace(group, first=group.first + first, stop=group.stop + first)
        for group in group_renderings(data.lengths[first:], piece)
    ]
    reads = read_ahead(partial(_read, data, group, start) for group in groups for start in group.starts)
    for group in groups:
        states: list[Any] = [None] * len(modules)
        failed: dict[int, str] = {}
        for start in group.starts:
            read, last = next(reads), group.is_last(start)
            if failed and group.streamed:
                continue
            failed |= read.faults
            outputs: list[np.ndarray] = []
            if read.batch is not None:
                outputs = _outputs(modules, read.batch, states, group, last, config, device)
            rows = dict(zip(read.samples, outputs, strict=True))
            for sample in range(group.first, group.stop):
                yield Passed(sample, rows.get(sample), last or sample in failed, failed.get(sample, ""))


def _read(data: DataSet, group: Group, start: int) -> _Read:
    samples, frames, faults = [], [], {}
    for sample in range(group.first, group.stop):
        try:
            frames.append(data.read(sample, start, min(start + group.piece, int(data.lengths[sample]))))
            samples.append(sample)
        except DataError as error:
            faults[sample] = str(error)
    return _Read(samples, collate(frames) if frames else None, faults)


def _outputs(
    modules: Sequence[Module],
    batch: Batch,
    states: list[Any],
    group: Group,
    last: bool,
    config: Config,
    device: torch.device,
) -> list[np.ndarray]:
    """Rows of each sample of the batch. `states`, one for each module, are those of a sample that is streamed."""
    frames, lengths = on_device(batch.frames, device), batch.lengths
    for number, on_host in enumerate(modules):
        module = copied(on_host, device)
        with torch.no_grad(), autocast(device, config.training.precision):
            if group.streamed:
                frames, states[number] = module.push(frames.float(), states[number], last)
                lengths = np.array([frames.shape[1]])
            else:
                frames = module(frames.float(), lengths)[1]
                lengths = module.out_length(lengths)
            del module
            frames = rounded(frames, config.cache.dtype, number + 1)
    return [_on_host(sample[:length]) for sample, length in zip(frames, lengths.tolist(), strict=True)]


def _on_host(rows: torch.Tensor) -> np.ndarray:
    rows = rows if rows.dtype == torch.float16 else rows.float()
    # Copied: on a CPU the array would share the tensor's memory and keep it on the device.
    return as_array(rows.cpu().contiguous()).copy()

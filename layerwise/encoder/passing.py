"""Samples on their way through all stages, one module on the device at a time and no more frames than a piece.

Nothing is cached, and a file gives the features that the run has cached for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from layerwise.cache.dtypes import as_array
from layerwise.data.batches import Batch, Group, collate, group_renderings, read_ahead
from layerwise.data.source import DataSet
from layerwise.errors import DataError
from layerwise.memory.meter import AnyMeter, metered
from layerwise.training.forward import InferenceStage, forward_stages, should_meter_group


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
    stages: Sequence[InferenceStage], data: DataSet, first: int, piece: int, device: torch.device, meter: AnyMeter
) -> Iterator[Passed]:
    """Samples `first` on, in their order, with what the last stage hands over.

    stages: lowest first; piece: most input frames on the device at once. Raises TrainingError where an output does not fit
    into the dtype of the run's caches.
    """
    groups = [
        replace(group, first=group.first + first, stop=group.stop + first)
        for group in group_renderings(data.lengths[first:], piece)
    ]
    reads = read_ahead(partial(_read, data, group, start) for group in groups for start in group.starts)
    for group in groups:
        states: list[Any] | None = [None] * len(stages) if group.streamed else None
        failed: dict[int, str] = {}
        look = should_meter_group(meter, group)
        for start in group.starts:
            read, last = next(reads), group.is_last(start)
            if failed and group.streamed:
                continue
            failed |= read.faults
            outputs: list[np.ndarray] = []
            if read.batch is not None:
                with metered(look):
                    outputs = _outputs(stages, read.batch, states, last, device)
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
    stages: Sequence[InferenceStage], batch: Batch, states: list[Any] | None, last: bool, device: torch.device
) -> list[np.ndarray]:
    """Rows of each sample of the batch."""
    for handed in forward_stages(stages, batch, states, last, device):
        frames, lengths = handed
    return [_on_host(sample[:length]) for sample, length in zip(frames, lengths.tolist(), strict=True)]


def _on_host(rows: torch.Tensor) -> np.ndarray:
    rows = rows if rows.dtype == torch.float16 else rows.float()
    # Copied: on a CPU the array would share the tensor's memory and keep it on the device.
    return as_array(rows.cpu().contiguous()).copy()

"""The input of a stage: batches of an epoch, and whole samples in pieces, from a source that is read ahead.

Noise and dropped frames are drawn anew for every step: the inputs of a stage above the first never change while it trains, as
they do where all modules train at once, so the stage may learn them by heart. They are drawn on the host before the batch is
sliced, so that slicing does not change them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import torch

from layerwise.config import TrainingOptions
from layerwise.data.batches import Batch, Epoch, Group, among_others, read_ahead, read_piece
from layerwise.data.source import Extent, OnDisk, Readable, pixels_apart
from layerwise.memory.meter import uncounted
from layerwise.memory.ranks import ALONE, Ranks

HOST = torch.device("cpu")

Offload = Callable[[], AbstractContextManager[object]]
"""Takes the stage off the device for as long as the block lasts; a feed that works on the device itself asks for it."""


Prepare = Callable[[int, Batch], Batch]
"""Makes a step's batch ready, in the thread that has read it."""


def as_read(step: int, batch: Batch) -> Batch:
    """Changes nothing."""
    return batch


class Loader(Extent, Protocol):
    """The input of a stage."""

    def batches(self, epoch: Epoch, first: int, offloaded: Offload, prepare: Prepare = as_read) -> Iterator[Batch]:
        """The batches of steps `first` on."""
        ...

    def pieces(self, groups: Sequence[Group], offloaded: Offload) -> Iterator[Batch]:
        """Every piece of every group, in order."""
        ...


class SourceLoader:
    """Reads a data set or a cache; nothing of it is on the device."""

    def __init__(
        self,
        source: Readable,
        ranks: Ranks = ALONE,
        device: torch.device = HOST,
        rows: torch.Tensor | None = None,
    ) -> None:
        """ranks: who shares the batches; the windows of the others are zeros, and not read. device: where pieces go.

        rows: of the device, where the source gives their numbers.
        """
        self._source, self._ranks, self._device, self._rows = source, ranks, device, rows
        self._threads = source.reading_threads if isinstance(source, OnDisk) else 1
        self.lengths, self.columns, self.views = source.lengths, source.columns, source.views
        self.pixels_apart = pixels_apart(source)

    def batches(self, epoch: Epoch, first: int, offloaded: Offload, prepare: Prepare = as_read) -> Iterator[Batch]:
        return read_ahead(self._reads(epoch, first, prepare), self._threads)

    def _reads(self, epoch: Epoch, first: int, prepare: Prepare) -> Iterator[Callable[[], Batch]]:
        for step in range(first, epoch.steps):
            epoch.expect(self._source, step, share_of(epoch, step, self._ranks))
            yield partial(self._read, epoch, step, prepare)

    def _read(self, epoch: Epoch, step: int, prepare: Prepare) -> Batch:
        share = share_of(epoch, step, self._ranks)
        batch = epoch.read(self._source, step, share)
        whole = in_whole_batch(batch, epoch, step, self, self._ranks)
        return prepare(step, replace(whole, rows=self._rows))

    def pieces(self, groups: Sequence[Group], offloaded: Offload) -> Iterator[Batch]:
        return read_ahead(partial(self._piece, group, start) for group in groups for start in group.starts)

    def _piece(self, group: Group, start: int) -> Batch:
        return pinned(replace(read_piece(self._source, group, start), rows=self._rows), self._device)


def share_of(epoch: Epoch, step: int, ranks: Ranks) -> slice:
    """The windows of a step that this rank reads; one that none are left for reads the first, to know what they are like."""
    share = ranks.share(len(epoch.samples_of(step)))
    return share if share.start < share.stop else slice(0, 1)


def in_whole_batch(batch: Batch, epoch: Epoch, step: int, extent: Extent, ranks: Ranks) -> Batch:
    """The windows of `share_of` in their places in the batch, whose other windows are zeros."""
    if ranks.count == 1:
        return batch
    return among_others(batch, epoch.lengths_of(extent, step), share_of(epoch, step, ranks).start)


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch in pinned memory, which a GPU fetches by itself; as it is for a CPU."""
    return replace(batch, frames=batch.frames.pin_memory()) if device.type == "cuda" else batch


def augmented(batch: Batch, options: TrainingOptions, rng: np.random.Generator) -> Batch:
    """The batch with `input_noise` and `frame_dropout`; padding stays zero."""
    if not options.input_noise and not options.frame_dropout:
        return batch
    with uncounted():
        frames = batch.frames.float()
        real = torch.from_numpy(np.arange(frames.shape[1]) < batch.lengths[:, None])
        kept = real & torch.from_numpy(rng.random(real.shape) >= options.frame_dropout)
        if options.input_noise:
            level = options.input_noise * frames[real].square().mean().sqrt()
            frames = frames + level * torch.from_numpy(rng.standard_normal(frames.shape, dtype=np.float32))
        frames = frames * kept.reshape(*kept.shape, *[1] * (frames.dim() - 2))
        return replace(batch, frames=frames.to(batch.frames.dtype))

"""What a stage is fed: the batches of an epoch, and whole samples in pieces, from a source that is read ahead."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from layerwise.data.batches import Batch, Epoch, read_ahead
from layerwise.data.groups import Group, read_piece
from layerwise.data.source import Extent, FrameSource

Parked = Callable[[], AbstractContextManager[object]]
"""Takes the stage off the device for as long as the block lasts; a feed that works on the device itself asks for it."""


class Feed(Extent, Protocol):
    """The input of a stage."""

    def batches(self, epoch: Epoch, first: int, parked: Parked) -> Iterator[Batch]:
        """The batches of steps `first` on."""
        ...

    def pieces(self, groups: list[Group], parked: Parked) -> Iterator[Batch]:
        """Every piece of every group, in order."""
        ...


class ReadFeed:
    """Reads a data set or a cache; nothing of it is on the device."""

    def __init__(self, source: FrameSource) -> None:
        self._source = source
        self.lengths, self.columns, self.views = source.lengths, source.columns, source.views

    def batches(self, epoch: Epoch, first: int, parked: Parked) -> Iterator[Batch]:
        return read_ahead(partial(epoch.read, self._source, step) for step in range(first, epoch.steps))

    def pieces(self, groups: list[Group], parked: Parked) -> Iterator[Batch]:
        return read_ahead(partial(read_piece, self._source, group, start) for group in groups for start in group.starts)

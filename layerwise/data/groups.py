"""Whole samples in groups that fit the device: the other way of reading a source, beside windows.

Neighbouring short samples share a padded batch; a sample longer than a piece stands alone and is read piece by piece.
Groups depend on lengths alone, so that a pass which goes on after a kill sees the same batches.
"""

from dataclasses import dataclass

import numpy as np

from layerwise.data.batches import Batch, read_windows
from layerwise.data.source import Readable


@dataclass(frozen=True, slots=True)
class Group:
    """Renderings first to stop, which pass through a module together; rendering i * views + v is sample i in view v."""

    first: int
    stop: int
    longest: int
    """Frames of the longest of them."""
    piece: int
    """Most frames that are on the device at once."""
    padded: bool
    """Whether they differ in length."""

    @property
    def streamed(self) -> bool:
        """Whether it is one long sample, read in several pieces."""
        return self.longest > self.piece

    @property
    def starts(self) -> range:
        """First frame of each piece."""
        return range(0, max(self.longest, 1), self.piece)

    def is_last(self, start: int) -> bool:
        """Whether the piece that begins at frame `start` is the last one."""
        return start + self.piece >= self.longest


def group_renderings(lengths: np.ndarray, piece: int) -> list[Group]:
    """Neighbouring renderings whose padded batch has at most `piece` frames. lengths: int64 [renderings]."""
    groups: list[Group] = []
    first, longest = 0, 0
    for rendering, length in enumerate(lengths.tolist()):
        if rendering > first and max(longest, length) * (rendering - first + 1) > piece:
            groups.append(_group(lengths, first, rendering, piece))
            first, longest = rendering, 0
        longest = max(longest, length)
    if len(lengths):
        groups.append(_group(lengths, first, len(lengths), piece))
    return groups


def _group(lengths: np.ndarray, first: int, stop: int, piece: int) -> Group:
    within = lengths[first:stop]
    return Group(first, stop, int(within.max()), piece, bool(within.min() < within.max()))


def read_piece(source: Readable, group: Group, start: int) -> Batch:
    """Frames start to start + piece of each rendering of the group."""
    renderings = (divmod(rendering, source.views) for rendering in range(group.first, group.stop))
    stop = start + group.piece
    return read_windows(
        source, [(sample, start, min(stop, int(source.lengths[sample])), view) for sample, view in renderings]
    )

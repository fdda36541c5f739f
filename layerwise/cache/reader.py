"""Reads an activation cache: windows by pread at the disk's speed, from any number of threads.

Only the path travels between processes; each reader opens its own descriptor.
"""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from layerwise.cache.format import (
    STORED_AS,
    Layout,
    data_offset,
    from_stored,
    open_checked,
    read_layout,
)
from layerwise.errors import CacheError


class ActivationCache:
    """A sealed cache, open for reading; a FrameSource for the next stage. Use as a context manager, or call `close`."""

    def __init__(self, path: Path) -> None:
        """Raises CacheError where the file is missing, not sealed, or shorter than it says."""
        self.path = path
        self.layout: Layout = read_layout(path)
        with open_checked(path) as file:
            if not file.attrs["complete"]:
                raise CacheError(f"{path} was never completed; start the run again to finish it.")
            self._checksums = file["checksums"][:]
        self._data_offset = data_offset(path)
        self._offsets = self.layout.offsets
        self._descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(self._descriptor).st_size
        needed = self._data_offset + self.layout.rows * self.layout.row_bytes
        if size < needed:
            self.close()
            raise CacheError(f"{path} is cut off: {size} of {needed} bytes; delete it and start the run again.")

    ids = property(lambda self: self.layout.ids)
    lengths = property(lambda self: self.layout.lengths)
    columns = property(lambda self: self.layout.columns)
    frame_shape = property(lambda self: self.layout.frame_shape)
    views = property(lambda self: self.layout.views)
    labels = property(lambda self: self.layout.labels)

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample: CPU tensor [stop - start, *frame shape] of the cache's dtype."""
        first = int(self._offsets[sample * self.views + view]) + start
        return self._rows(first, stop - start)

    def verify(self, poll: Callable[[], None] = lambda: None) -> None:
        """Compares every block with its checksum, and calls `poll` between them, which may raise.

        Raises CacheError that names the first damaged block.
        """
        end = self.layout.rows * self.layout.row_bytes
        buffer = np.empty(min(self.layout.block_bytes, end), dtype=np.uint8)
        for block, expected in enumerate(self._checksums):
            poll()
            start = block * self.layout.block_bytes
            part = buffer[: min(self.layout.block_bytes, end - start)]
            self._read_into(part, start)
            if zlib.crc32(part) != expected:
                raise CacheError(
                    f"Block {block} of {self.path} is damaged; delete the file and start the run again to rebuild it."
                )

    def close(self) -> None:
        """Gives the descriptor back; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "ActivationCache":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _rows(self, first: int, count: int) -> torch.Tensor:
        rows = np.empty((count, *self.frame_shape), dtype=STORED_AS[self.layout.dtype])
        if rows.size:
            self._read_into(rows.reshape(-1).view(np.uint8), first * self.layout.row_bytes)
        return from_stored(rows, self.layout.dtype)

    def _read_into(self, buffer: np.ndarray, position: int) -> None:
        view = memoryview(buffer)
        while view:
            count = os.preadv(self._descriptor, [view], self._data_offset + position)
            if count == 0:
                raise CacheError(f"{self.path} ends early; delete it and start the run again to rebuild it.")
            view, position = view[count:], position + count

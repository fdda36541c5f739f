"""The activations' bytes, block by block: each block is compared with its checksum the first time that it is read.

A stretch that is read for the first time is widened to whole blocks. One bit per block remembers what was compared, and
the checksums stay in the file, so memory stays small, whatever the size of the cache.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from layerwise.cache.crc import crc32
from layerwise.cache.format import Places
from layerwise.cache.layout import Layout
from layerwise.cache.positional import read_stored
from layerwise.errors import DamagedCache

_CHUNK = 2**20
"""Bytes that are read at once to check all blocks."""


class Blocks:
    """Reads from any number of threads, and on in a forked child. Bytes count from the first activation."""

    def __init__(self, path: Path, descriptor: int, layout: Layout, places: Places) -> None:
        self._path, self._descriptor, self._places = path, descriptor, places
        self._block_bytes, self._size, self._count = layout.block_bytes, layout.activation_bytes, layout.blocks
        self._compared = bytearray(-(-layout.blocks // 8))

    def read(self, position: int, stop: int) -> np.ndarray:
        """uint8 [stop - position]. Raises DamagedCache that names the block."""
        if position == stop:
            return np.empty(0, dtype=np.uint8)
        first, last = position // self._block_bytes, (stop - 1) // self._block_bytes
        bits = int.from_bytes(self._compared[first >> 3 : (last >> 3) + 1], "little") >> (first & 7)
        if ~bits & ((1 << last + 1 - first) - 1) == 0:
            return self._read(position, stop)
        new = [block for block in range(first, last + 1) if not bits >> (block - first) & 1]
        start = first * self._block_bytes if new[0] == first else position
        end = self._end(last) if new[-1] == last else stop
        content = self._read(start, end)
        self._compare(new, content, start)
        return content[position - start : stop - start]

    def check_all(self, poll: Callable[[], None]) -> None:
        """Compares every block, whether or not it was before; calls `poll` now and then, which may raise."""
        step = max(_CHUNK // self._block_bytes, 1)
        for first in range(0, self._count, step):
            poll()
            blocks = range(first, min(first + step, self._count))
            start = first * self._block_bytes
            self._compare(blocks, self._read(start, self._end(blocks[-1])), start)

    def _end(self, block: int) -> int:
        return min((block + 1) * self._block_bytes, self._size)

    def _compare(self, blocks: list[int] | range, content: np.ndarray, start: int) -> None:
        """Of blocks that lie wholly in the content, which begins at `start`."""
        table, count = self._places.checksums + 4 * blocks[0], blocks[-1] + 1 - blocks[0]
        checksums = read_stored(self._path, self._descriptor, table, 4 * count).view("<u4").tolist()
        view, size = memoryview(content), self._block_bytes
        for block in blocks:
            first = block * size - start
            if crc32(view[first : first + size]) != checksums[block - blocks[0]]:
                raise DamagedCache(self._path, f"block {block} of its activations does not match its checksum")
        for block in blocks:
            # Two threads may lose each other's bit; then that block is compared once more.
            self._compared[block >> 3] |= 1 << (block & 7)

    def _read(self, start: int, stop: int) -> np.ndarray:
        return read_stored(self._path, self._descriptor, self._places.activations + start, stop - start)

"""The activations, block by block: each block is compared with its checksum the first time that it is read.

A stretch that is read for the first time is widened to whole blocks. A checksum goes on from that of the block before, so
the stretch takes one computation, from the checksum before it to that of its last block. One bit per block remembers what
was compared, and the checksums stay in the file, so a cache of 1 TB takes 31 MB of memory.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from layerwise.cache.dtypes import STORED
from layerwise.cache.file_io import CRC32_ADDRESS, crc32, fetch, in_memory, read_into, read_table
from layerwise.cache.layout import Layout, Places
from layerwise.errors import DamagedCache

try:
    from layerwise.cache.compiled_reads import read_windows
except ImportError:  # it was installed without a compiler
    read_windows = None  # type: ignore[assignment]

_CHUNK = 2**20
"""Bytes that are read at once to check all blocks."""
_CALM = 8
"""Batches in a row whose first window lay in memory, after which the next is not fetched: there that costs a tenth."""
_ALL_EIGHT = 0b11111111


class Blocks:
    """Reads from any number of threads, and on in a forked child."""

    def __init__(self, path: Path, descriptor: int, layout: Layout, places: Places) -> None:
        self._path, self._descriptor, self._places = path, descriptor, places
        self._block_bytes, self._size, self._count = layout.block_bytes, layout.activation_bytes, layout.blocks
        self._chain = layout.chain_blocks
        self._batches_in_memory = 0
        self._row_bytes, self._frame_shape = layout.row_bytes, layout.frame_shape
        self._on_disk = np.dtype(STORED[layout.dtype].on_disk)
        self._compared = bytearray(-(-layout.blocks // 8))
        self.together = read_windows is not None and CRC32_ADDRESS != 0
        """Whether several stretches can be read in one go, without Python's lock."""

    def read(self, first_row: int, stop_row: int) -> np.ndarray:
        """[stop_row - first_row, *frame shape] of the dtype on the disk. Raises DamagedCache that names the block."""
        shape = (stop_row - first_row, *self._frame_shape)
        position, stop = first_row * self._row_bytes, stop_row * self._row_bytes
        first, last = position // self._block_bytes, (stop - 1) // self._block_bytes
        new = self._not_compared(first, last) if position < stop else 0
        if not new:
            return self._read(position, np.empty(shape, self._on_disk))
        first_new, last_new = first + (new & -new).bit_length() - 1, first + new.bit_length() - 1
        start = first * self._block_bytes if first_new == first else position
        end = self._end(last) if last_new == last else stop
        content = self._read(start, np.empty(end - start, np.uint8))
        self._compare(first_new, last_new, content, start)
        return np.ndarray(shape, self._on_disk, content, position - start)

    def read_together(self, stretches: Sequence[tuple[int, int]], into: np.ndarray) -> int:
        """Reads rows from to straight to their places, where it can; gives how many stretches it read, from the first on.

        into: [stretches, rows, *frame shape] of the dtype on the disk, contiguous; becomes zero behind the shorter ones.
        Those that it left, for want of a compiler or because something is wrong with them, are for `read`.
        """
        if not self.together:
            return 0
        places = self._places.activations, self._places.checksums
        sizes = self._size, self._row_bytes, self._block_bytes, self._chain
        rows = array("q", chain.from_iterable(stretches))
        return read_windows(
            (self._descriptor, *places, *sizes, CRC32_ADDRESS), self._compared, rows, into, into.strides[0]
        )

    def prefetch(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Has the system fetch the rows, from to, of a batch that is read soon; not while all batches lie in memory."""
        for number, (first, stop) in enumerate(stretches):
            place, size = self._places.activations + first * self._row_bytes, (stop - first) * self._row_bytes
            if number == 0:
                self._batches_in_memory = self._batches_in_memory + 1 if in_memory(self._descriptor, place) else 0
                if self._batches_in_memory > _CALM:
                    return
            fetch(self._descriptor, place, size)

    def check_all(self, poll: Callable[[], None]) -> None:
        """Compares every block, whether or not it was before; calls `poll` now and then, which may raise."""
        step = max(_CHUNK // self._block_bytes, 1)
        for first in range(0, self._count, step):
            poll()
            last, start = min(first + step, self._count) - 1, first * self._block_bytes
            self._compare(first, last, self._read(start, np.empty(self._end(last) - start, np.uint8)), start)

    def _not_compared(self, first: int, last: int) -> int:
        """One bit for each of blocks first to last, the lowest for the first."""
        low, high = first >> 3, (last >> 3) + 1
        if self._compared.count(_ALL_EIGHT, low, high) == high - low:  # twice as fast as what follows
            return 0
        compared = int.from_bytes(self._compared[low:high], "little") >> (first & 7)
        return ~compared & ((1 << last + 1 - first) - 1)

    def _end(self, block: int) -> int:
        return min((block + 1) * self._block_bytes, self._size)

    def _compare(self, first: int, last: int, content: np.ndarray, start: int) -> None:
        """Blocks first to last, which lie wholly in the content; that begins at `start`."""
        size, chain, view = self._block_bytes, self._chain, memoryview(content)
        before = max(first - 1, 0)
        table = read_table(self._path, self._descriptor, "<u4", self._places.checksums, before, last + 1)
        checksums = table.tolist()
        block = first
        while block <= last:
            stop = min(block - block % chain + chain, last + 1)
            checksum = checksums[block - 1 - before] if block % chain else 0
            if crc32(view[block * size - start : stop * size - start], checksum) != checksums[stop - 1 - before]:
                raise self._damaged(block, checksum, view[block * size - start :], checksums[block - before :])
            block = stop
        # Two threads may lose each other's bits; then those blocks are compared once more.
        low, high = first >> 3, (last >> 3) + 1
        compared = int.from_bytes(self._compared[low:high], "little") | ((1 << last + 1 - first) - 1) << (first & 7)
        self._compared[low:high] = compared.to_bytes(high - low, "little")

    def _damaged(self, block: int, checksum: int, content: memoryview, checksums: list[int]) -> DamagedCache:
        """Names the first block, from `block` on, that leads from the checksum before it to another one than it should."""
        size = self._block_bytes
        for number, expected in enumerate(checksums):
            checksum = crc32(content[number * size : (number + 1) * size], checksum)
            if checksum != expected:
                block += number
                break
        return DamagedCache(self._path, f"block {block} of its activations does not match its checksum")

    def _read(self, position: int, into: np.ndarray) -> np.ndarray:
        """Fills the array with the bytes from there on, counted from the first activation, and gives it back."""
        read_into(self._path, self._descriptor, self._places.activations + position, into)
        return into

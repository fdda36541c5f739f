"""The activations' bytes where they are compressed: each block is one zstd frame, which is found by its place in a table.

HDF5 and its lock have no part in it: a block becomes a frame and back as HDF5's own shuffle and its registered filter 32015
would do it. Shuffled: the first bytes of all numbers, then the second ones, and so on; those that hold exponents are much
alike. A checksum is compared at every read, before the frame is decoded: it takes a thirtieth of the time. Places and
checksums stay in the file, so memory stays small, whatever the size of the cache.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from layerwise.cache.dtypes import STORED
from layerwise.cache.file_io import crc32, read_stored, read_table
from layerwise.cache.layout import Layout, Places
from layerwise.errors import CacheError, DamagedCache

try:
    import zstandard
except (ImportError, OSError, RuntimeError):
    zstandard = None  # type: ignore[assignment]  # a module has no type that says so

FILTER = 32015
"""zstd's number in the HDF Group's registry of filters."""

LEVEL = 1
"""Higher ones gain nothing on activations and cost up to seven times as much, see benchmarks/RESULTS.md."""

_AT_ONCE = 16
"""Blocks that are read at once to check all."""


def require_zstandard() -> None:
    """Raises CacheError where the package is not installed."""
    if zstandard is None:
        raise CacheError("Compressed caches need zstandard; install it: pip install 'layerwise[compression]'.")


def longest_frame(size: int) -> int:
    """Most bytes that `size` bytes can take when they are compressed: a little more than they are."""
    return size + size // 256 + 64


def encode(chunks: np.ndarray, itemsize: int) -> list[bytes]:
    """The frames of chunks uint8 [n, bytes of a chunk]. The same chunk gives the same frame."""
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    shuffled = np.ascontiguousarray(chunks.reshape(len(chunks), -1, itemsize).swapaxes(1, 2))
    return [compressor.compress(memoryview(chunk).cast("B")) for chunk in shuffled]


class PackedBlocks:
    """Reads from any number of threads, and on in a forked child."""

    together = False

    def __init__(self, path: Path, descriptor: int, layout: Layout, places: Places) -> None:
        """Raises CacheError where zstandard is not installed."""
        require_zstandard()
        self._path, self._descriptor, self._places = path, descriptor, places
        self._block_bytes, self._count = layout.block_bytes, layout.blocks
        self._row_bytes, self._frame_shape = layout.row_bytes, layout.frame_shape
        self._on_disk = np.dtype(STORED[layout.dtype].on_disk)

    def read(self, first_row: int, stop_row: int) -> np.ndarray:
        """[stop_row - first_row, *frame shape] of the dtype on the disk. Raises DamagedCache that names the block."""
        size, itemsize = self._block_bytes, self._on_disk.itemsize
        decompressor = zstandard.ZstdDecompressor()
        position, stop = first_row * self._row_bytes, stop_row * self._row_bytes
        content = np.empty(((stop - position) // itemsize, itemsize), dtype=np.uint8)
        first, last = position // size, -(-stop // size)
        for block, frame in self._frames(first, last) if position < stop else ():
            try:
                if zstandard.frame_content_size(memoryview(frame)) != size:  # what decompress would allocate
                    raise zstandard.ZstdError
                decoded = decompressor.decompress(memoryview(frame))
            except zstandard.ZstdError:
                raise DamagedCache(self._path, f"block {block} of its activations cannot be decompressed") from None
            shuffled, start = np.frombuffer(decoded, dtype=np.uint8).reshape(itemsize, -1), block * size
            wanted = slice(max(position - start, 0) // itemsize, min(stop - start, size) // itemsize)
            there = slice(max(start - position, 0) // itemsize, (min(start + size, stop) - position) // itemsize)
            for byte in range(itemsize):  # a quarter of the time that numpy takes for all at once
                content[there, byte] = shuffled[byte, wanted]
        return content.view(self._on_disk).reshape(stop_row - first_row, *self._frame_shape)

    def read_together(self, stretches: Sequence[tuple[int, int]], into: np.ndarray) -> int:
        """Reads none of them: decompression takes so long that nothing would be gained."""
        return 0

    def prefetch(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Fetches nothing: decompression takes longer than the disk."""

    def check_all(self, poll: Callable[[], None]) -> None:
        """Compares every block with its checksum; calls `poll` now and then, which may raise."""
        for first in range(0, self._count, _AT_ONCE):
            poll()
            for _ in self._frames(first, min(first + _AT_ONCE, self._count)):
                pass

    def _frames(self, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Each of these blocks: its number, and its bytes as they lie in the file, which match their checksum."""
        file = self._path, self._descriptor
        places = read_table(*file, "<i8", self._places.places, first, stop + 1)
        checksums = read_table(*file, "<u4", self._places.checksums, first, stop).tolist()
        begin, end = places[0].item(), places[-1].item()
        inside = self._places.activations <= begin and end <= self._places.activations + self._places.stored_bytes
        rising = bool((places[1:] > places[:-1]).all())
        if not (inside and rising) or np.diff(places).max() > longest_frame(self._block_bytes):
            raise DamagedCache(self._path, f"the places of blocks {first} to {stop - 1} contradict themselves")
        content = read_stored(*file, begin, end - begin)
        for number, block in enumerate(range(first, stop)):
            frame = content[places[number] - begin : places[number + 1] - begin]
            if crc32(frame) != checksums[number]:
                raise DamagedCache(self._path, f"block {block} of its activations does not match its checksum")
            yield block, frame

"""Packs a whole cache: the same file anew, with its activations compressed, block by block.

HDF5 keeps the index of the chunks, so that anyone's h5py with hdf5plugin reads the file; the frames are made here, by several
threads, and HDF5 only stores them. The raw file stays until the packed one was read back whole: a kill or a full disk on the
way costs nothing but the packing.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from layerwise.cache.blocks import Blocks
from layerwise.cache.dtypes import STORED
from layerwise.cache.file_io import crc32, read_stored, write_all
from layerwise.cache.format import LARGEST_BLOCK, LIBVER, create, file_bytes, read_layout, set_complete
from layerwise.cache.layout import Layout
from layerwise.cache.reader import ActivationCache
from layerwise.cache.seal import stamp
from layerwise.cache.zstd import encode, longest_frame
from layerwise.files import open_own

BLOCK_BYTES = 32 * 2**10
"""What becomes one frame, before it is compressed: so little that a window of a few rows need not decode much around it.

64 KiB save 1 % more room and give short windows 0.8 times as fast, see benchmarks/RESULTS.md.
"""

_AT_ONCE = 16
"""Blocks that a thread compresses at once."""

_COPIED_BYTES = 2**20


def packed(layout: Layout) -> Layout:
    """The layout of the packed file. One without rows, or with very long ones, stays as it is."""
    if not 0 < layout.row_bytes <= LARGEST_BLOCK or layout.rows == 0:
        return layout
    rows = min(max(BLOCK_BYTES // layout.row_bytes, 1), layout.rows)
    return replace(layout, block_bytes=rows * layout.row_bytes, chain_blocks=1, compression="zstd")


def packed_bytes(layout: Layout) -> int:
    """Most that a packed file of this layout takes: as if nothing shrank."""
    most = layout.blocks * longest_frame(layout.block_bytes) + _index_bytes(layout)
    return file_bytes(layout) - layout.activation_bytes + most


def pack(part: Path, path: Path, poll: Callable[[], None]) -> None:
    """Writes the cache in `part`, of which every row is there, to `path`: complete, sealed and read back.

    Calls `poll` now and then, which may raise. Raises OSError where the disk does not take it, DamagedCache where it does
    not give back what was written; then nothing is left at `path`.
    """
    try:
        with open_own(part) as raw:
            raw_layout, raw_places = read_layout(part, raw.fileno())
            layout = packed(raw_layout)
            create(path, layout)
            with open_own(path) as file:
                places = read_layout(path, file.fileno())[1]
                scales, frames = 4 * math.prod(layout.scales_shape), 4 * int(layout.frames[-1])
                stretches = [(raw_places.scales, places.scales, scales)]
                stretches += [(raw_places.frame_labels[name], at, frames) for name, at in places.frame_labels.items()]
                for source, target, size in stretches:
                    for start in range(0, size, _COPIED_BYTES):
                        content = read_stored(part, raw.fileno(), source + start, min(_COPIED_BYTES, size - start))
                        write_all(file.fileno(), memoryview(content), target + start)
                # HDF5 does not survive a disk that is full, and here it must not write through Python.
                os.posix_fallocate(file.fileno(), 0, packed_bytes(layout))
            sizes, checksums = _write_frames(path, layout, Blocks(part, raw.fileno(), raw_layout, raw_places), poll)
        set_complete(path)
        # HDF5 puts one frame behind another, to the end of the file: what is read back below lies there, or is refused.
        start, length = path.stat().st_size - int(sizes.sum()), int(sizes.sum())
        with open_own(path) as file:
            table = start + np.concatenate([[0], np.cumsum(sizes)])
            write_all(file.fileno(), table.astype("<i8").tobytes(), places.places)
            write_all(file.fileno(), checksums.astype("<u4").tobytes(), places.checksums)
        stamp(path, start, length)
        with ActivationCache(path) as whole:
            whole.verify(poll)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write_frames(
    path: Path, layout: Layout, source: Blocks, poll: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and checksums of the frames, int64 and uint32 [blocks]."""
    size, itemsize = layout.block_bytes, np.dtype(STORED[layout.dtype].on_disk).itemsize
    block_rows = size // layout.row_bytes
    sizes, checksums = np.empty(layout.blocks, dtype=np.int64), np.empty(layout.blocks, dtype=np.uint32)

    def frames_from(first: int) -> list[bytes]:
        count = min(_AT_ONCE, layout.blocks - first)
        read = source.read(first * block_rows, min((first + count) * block_rows, layout.rows))
        content = read.reshape(-1).view(np.uint8)
        if len(content) < count * size:  # HDF5's chunks are always whole
            content = np.concatenate([content, np.zeros(count * size - len(content), dtype=np.uint8)])
        return encode(content.reshape(count, size), itemsize)

    threads = len(os.sched_getaffinity(0))
    within = [0] * len(layout.frame_shape)
    with (
        ThreadPoolExecutor(threads, "packing") as pool,
        h5py.File(path, "r+", libver=LIBVER, locking=False, meta_block_size=_index_bytes(layout)) as file,
    ):
        rows = file["activations"].id
        for first in range(0, layout.blocks, threads * _AT_ONCE):
            poll()
            starts = range(first, min(first + threads * _AT_ONCE, layout.blocks), _AT_ONCE)
            for block, frame in enumerate(
                (frame for frames in pool.map(frames_from, starts) for frame in frames), first
            ):
                rows.write_direct_chunk((block * block_rows, *within), frame)
                sizes[block], checksums[block] = len(frame), crc32(frame)
    return sizes, checksums


def _index_bytes(layout: Layout) -> int:
    """Most that HDF5's index of the chunks takes. Claimed at once, it does not come to lie between them.

    It is a B-tree of nodes with 32 to 64 entries; a key has 4 bytes for a size, 4 for the filters, 8 for each dimension.
    """
    key = 8 + 8 * (2 + len(layout.frame_shape))
    return (24 + 64 * 8 + 65 * key) * (layout.blocks // 31 + 8)

"""Caches of a few rows, with several blocks each."""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from layerwise.cache import ActivationCache, CacheWriter, Layout
from layerwise.cache.dtypes import STORED, as_array
from layerwise.cache.seal import stamp


def layout(
    lengths: list[int],
    dtype: str = "float16",
    views: int = 1,
    block_bytes: int = 100,
    chain_blocks: int = 3,
    scale_rows: int = 1024,
) -> Layout:
    """Frames of 3 channels, with labels of every kind."""
    count = len(lengths)
    return Layout(
        fingerprint="f" * 64,
        stage=2,
        dtype=dtype,
        frame_shape=(3,),
        columns=1,
        views=views,
        lengths=np.array(lengths, dtype=np.int64),
        ids=tuple(f"größe-{number}" for number in range(count)),
        split=np.arange(count, dtype=np.uint8) % 3,
        labels={"speaker": np.arange(count, dtype=np.int32) % 2},
        labels_classes={"speaker": ("s0", "s1")[:count]},
        frame_labels_classes={"phone": ("a", "b")},
        hop=160,
        offset=4.5,
        block_bytes=block_bytes,
        chain_blocks=chain_blocks,
        scale_rows=scale_rows,
    )


def rows_of(a_layout: Layout) -> torch.Tensor:
    """Rows as they are before the writer gets them."""
    values = torch.arange(a_layout.rows * 3, dtype=torch.float32).reshape(-1, 3) / 16
    return values.to(STORED[a_layout.dtype].tensor)


def write(
    path: Path,
    a_layout: Layout,
    rows: torch.Tensor,
    pieces: int = 3,
    append_bytes: int = 1,
    compression: str = "none",
) -> None:
    """Seals a cache, in appends of one block where not told otherwise; goes on where an earlier writer stopped.

    Compressed, it has blocks of at most a kilobyte.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("layerwise.cache.packing.BLOCK_BYTES", 1000)
        with CacheWriter(path, a_layout, append_bytes, compression) as writer:
            for piece in torch.tensor_split(rows[writer.rows_done :], pieces):
                writer.write(as_array(piece.contiguous()))
            seal(writer)


def seal(writer: CacheWriter, *poll: Callable[[], None]) -> None:
    """Ends the file; its frames are labelled a, b, a, b and so on."""
    for name in writer.layout.frame_labels_classes:
        for sample, (first, stop) in enumerate(pairwise(writer.layout.frames.tolist())):
            writer.put_frame_labels(name, sample, np.array(["a", "b"])[np.arange(first, stop) % 2])
    writer.seal(*poll)


def read_all(path: Path) -> torch.Tensor:
    """Every row, window by window."""
    with ActivationCache(path) as cache:
        views = range(cache.views)
        return torch.cat(
            [cache.read(sample, 0, int(length), view) for sample, length in enumerate(cache.lengths) for view in views]
        )


def read_batches(path: Path) -> list[torch.Tensor]:
    """Every row, a view of all samples at once, as training reads them."""
    with ActivationCache(path) as cache:
        lengths = [(sample, 0, length) for sample, length in enumerate(cache.lengths.tolist())]
        return [cache.read_batch([(*window, view) for window in lengths]) for view in range(cache.views)]


def reseal(path: Path) -> None:
    """A seal that fits what the file holds now: a hostile writer can compute checksums too."""
    with h5py.File(path) as file:
        if file.attrs.get("compression") == b"zstd" and len(file["places"]):
            first, *_, last = file["places"][:].tolist()
            stamp(path, first, last - first)
            return
        activations = file.get("activations", getlink=True)
        data_set = file["activations"].id if isinstance(activations, h5py.HardLink) else None
        start = data_set.get_offset() if data_set else None
        length = data_set.get_storage_size() if start else 0
    stamp(path, start or 0, length)


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Asserts that no more than that many bytes are taken at any moment of the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()

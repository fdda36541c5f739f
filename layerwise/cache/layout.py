"""What a cache holds besides its activations, fixed before the first row is written; and the blocks of each of its writers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from layerwise.cache.dtypes import SCALE_ROWS, STORED
from layerwise.errors import CacheError

BLOCK_BYTES = 4 * 2**10
"""Bytes between two checksums: a page, so that the first read of a window takes no more from the disk than any other."""

CHAIN_BLOCKS = 256
"""Blocks whose checksums go on from one another, in a large cache."""

CHAINS = 64
"""A cache has at least so many chains, or one for each block: processes that share it begin where chains do."""

SPLITS = ("train", "held-out", "test")
"""Meaning of the numbers in the data set `split`."""


def as_codes(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels str [n] as int32 [n], indices into their classes."""
    classes, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.int32), tuple(classes.tolist())


def as_bytes(names: Iterable[str]) -> np.ndarray:
    """Names as HDF5 stores them: UTF-8, padded to the longest."""
    return np.array([name.encode() for name in names], dtype=bytes)


def in_chains(layout: "Layout") -> "Layout":
    """The same with chains as long as its size allows."""
    return replace(layout, chain_blocks=min(max(layout.blocks // CHAINS, 1), CHAIN_BLOCKS))


@dataclass(frozen=True, eq=False)
class Layout:
    """Two layouts are equal where every field is."""

    fingerprint: str
    """Hash of everything that made the activations."""
    stage: int
    dtype: str
    """float16, bfloat16, float32 or int8."""
    frame_shape: tuple[int, ...]
    columns: int
    """Frames per row: 1 for sequences, patches per row for pictures."""
    views: int
    """Renderings of each sample, stored one after another."""
    lengths: np.ndarray
    """int64 [N], frames of each sample in one view."""
    ids: tuple[str, ...]
    """[N]"""
    split: np.ndarray
    """uint8 [N], an index into SPLITS."""
    labels: dict[str, np.ndarray]
    """Label name to int32 [N], an index into its classes."""
    labels_classes: dict[str, tuple[str, ...]]
    """An empty string where a sample has none."""
    frame_labels_classes: dict[str, tuple[str, ...]]
    """The labels that each frame has; which ones these are is in the file alone: there are as many as frames."""
    hop: int
    """Distance between two frames, in frames of the network's input (samples of audio)."""
    offset: float
    """Centre of frame 0, in frames of the network's input."""
    block_bytes: int = BLOCK_BYTES
    """Bytes between two checksums, before they are compressed."""
    chain_blocks: int = CHAIN_BLOCKS
    """Blocks of a chain: a checksum covers its block and those before it in its chain, so any stretch is compared at once."""
    scale_rows: int = SCALE_ROWS
    """Rows that share one scale per channel; int8 alone has scales."""
    compression: str = "none"
    """none, or zstd: then a block is a chunk of whole rows that is stored as one zstd frame."""

    def __post_init__(self) -> None:
        """Raises CacheError where HDF5 cannot store a label under its name."""
        for name in (*self.labels, *self.frame_labels_classes):
            if name in ("", ".") or "/" in name or "\0" in name:
                raise CacheError(
                    f"A label cannot be called {name!r}: it names a data set of the cache; choose letters."
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return all(_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [N * views + 1]: rows of sample i, view v are offsets[i * views + v] to the next entry."""
        return np.concatenate([[0], np.cumsum(np.repeat(self.lengths, self.views))]).astype(np.int64)

    @cached_property
    def frames(self) -> np.ndarray:
        """int64 [N + 1]: labels of the frames of sample i are frames[i] to the next entry; views share them."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @cached_property
    def rows(self) -> int:
        """Frames of all samples and views."""
        return int(self.lengths.sum()) * self.views

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one frame."""
        return math.prod(self.frame_shape) * np.dtype(STORED[self.dtype].on_disk).itemsize

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes of all activations."""
        return self.rows * self.row_bytes

    @cached_property
    def blocks(self) -> int:
        """Number of checksummed blocks."""
        return -(-self.activation_bytes // self.block_bytes)

    @cached_property
    def scales_shape(self) -> tuple[int, int]:
        """Groups of rows that share scales, channels. (0, 0) where the dtype needs none."""
        if self.dtype != "int8":
            return (0, 0)
        return -(-self.rows // self.scale_rows), self.frame_shape[0]


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks `first` to `stop`, which one process writes while others write the rest of the same file.

    They are whole chains. Blocks end inside rows, so the rows of two spans overlap.
    """

    layout: Layout
    first: int
    stop: int

    @property
    def stop_byte(self) -> int:
        """Of the activations."""
        return min(self.stop * self.layout.block_bytes, self.layout.activation_bytes)

    @property
    def stop_row(self) -> int:
        """Behind the last row that has bytes in it; for int8, behind the last whole group of rows."""
        layout = self.layout
        rows = -(-self.stop_byte // layout.row_bytes)
        if layout.dtype == "int8":
            rows = -(-rows // layout.scale_rows) * layout.scale_rows
        return min(rows, layout.rows)


@dataclass(frozen=True, slots=True)
class Places:
    """First bytes, in the file, of what is read and written without HDF5."""

    activations: int
    stored_bytes: int
    """That the activations take."""
    checksums: int
    scales: int
    places: int
    frame_labels: dict[str, int]


def spans(layout: Layout, count: int) -> list[Span]:
    """The whole cache in `count` spans of nearly as many chains; of few chains the last spans are empty.

    An empty span lies behind all blocks: were it where another begins, the two writers would share a journal.
    """
    chains, size = -(-layout.blocks // layout.chain_blocks), layout.chain_blocks
    ends = [
        min((part * (chains // count) + min(part, chains % count)) * size, layout.blocks) for part in range(count + 1)
    ]
    return [Span(layout, first, stop) for first, stop in pairwise(ends)]


def _equal(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)

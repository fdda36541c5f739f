"""The dtypes of a cache: as tensors, as arrays of the writer and the reader, and as they lie on the disk.

int8 has a scale per channel: every `scale_rows` rows of a cache are a group, and each of its channels has one scale. The
channels are the leading axis of a frame. x is stored as round(x / scale), where scale is the largest absolute value of the
channel in the group, over 127; so an error is at most half a scale.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

SCALE_ROWS = 1024
"""Rows that share scales. A window touches one or two groups; the scales take 0.4 % of the bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One dtype of a cache."""

    tensor: torch.dtype
    """Rows before they are written and after they are read."""
    array: str
    """numpy's name of what `as_array` makes of such rows."""
    on_disk: str
    """numpy's name of the dtype in the HDF5 file."""


STORED = {
    "float16": Stored(torch.float16, "<f2", "<f2"),
    "bfloat16": Stored(torch.bfloat16, "<u2", "<u2"),  # HDF5 and numpy have no bfloat16: its bits
    "float32": Stored(torch.float32, "<f4", "<f4"),
    "int8": Stored(torch.float32, "<f4", "|i1"),  # the writer quantises
}


def largest(values: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, a scalar: NaN where one is NaN, 0 where there is none.

    Unlike isfinite it makes no copy of the values; on a CPU it reads float16 15 times as fast.
    """
    if not values.numel():
        return values.new_zeros(())
    as_they_lie = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
    if not as_they_lie.is_contiguous():  # aminmax would make a copy that no meter sees
        return torch.linalg.vector_norm(values, math.inf)
    low, high = torch.aminmax(as_they_lie)
    return torch.maximum(low.abs(), high.abs())


def as_array(rows: torch.Tensor) -> np.ndarray:
    """The array that shares the memory of a contiguous CPU tensor; bfloat16 as the uint16 of its bits."""
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def as_tensor(rows: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `as_array`."""
    tensor = torch.from_numpy(rows)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows float32 [n, C, ...] as int8 of the same shape, and their scales float32 [C]."""
    axes = tuple(axis for axis in range(rows.ndim) if axis != 1)
    scales = np.abs(rows).max(axis=axes) / np.float32(127)
    # 1 for silent channels. So are those so faint that float32 could not hold their scale exactly.
    scales[scales < np.finfo(np.float32).tiny] = 1
    stretched = scales.reshape(-1, *[1] * (rows.ndim - 2))
    return np.clip(np.rint(rows / stretched), -127, 127).astype(np.int8), scales


def dequantise(stored: np.ndarray, scales: np.ndarray, first_row: int, scale_rows: int) -> np.ndarray:
    """int8 rows [n, C, ...] as float32.

    The rows begin at `first_row` of the cache; `scales` float32 [groups, C] begins with that row's group.
    """
    group = (np.arange(first_row, first_row + len(stored)) // scale_rows) - first_row // scale_rows
    per_row = scales[group]
    return stored * per_row.reshape(*per_row.shape, *[1] * (stored.ndim - 2))


class Quantiser:
    """Rows in, whole groups out; the last group of a cache may be shorter."""

    def __init__(self, rows: int, frame_shape: tuple[int, ...], scale_rows: int) -> None:
        """`rows` is how many rows will come, from the beginning of a group on."""
        self._rows_left, self._scale_rows = rows, scale_rows
        self._group = np.empty((min(rows, scale_rows), *frame_shape), dtype=np.float32)
        self._filled = 0

    def push(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows float32 [n, *frame shape]; gives `quantise` of each group that becomes whole."""
        while len(rows):
            whole = min(self._rows_left, self._scale_rows)
            count = min(whole - self._filled, len(rows))
            self._group[self._filled : self._filled + count] = rows[:count]
            rows, self._filled = rows[count:], self._filled + count
            if self._filled == whole:
                yield quantise(self._group[:whole])
                self._rows_left, self._filled = self._rows_left - whole, 0

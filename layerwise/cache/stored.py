"""The dtypes of a cache: as tensors, as the writer is handed them, and as they lie on the disk."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Stored:
    """One dtype of a cache."""

    tensor: torch.dtype
    """Rows before they are written and after they are read."""
    handed_over: str
    """numpy's name of what `as_array` makes of such rows."""
    on_disk: str
    """numpy's name of the dtype in the HDF5 file."""


STORED = {
    "float16": Stored(torch.float16, "<f2", "<f2"),
    "bfloat16": Stored(torch.bfloat16, "<u2", "<u2"),  # HDF5 and numpy have no bfloat16: its bits
    "float32": Stored(torch.float32, "<f4", "<f4"),
    "int8": Stored(torch.float32, "<f4", "|i1"),  # the writer quantises, see quantise.py
}


def as_array(rows: torch.Tensor) -> np.ndarray:
    """The array that shares the memory of a contiguous CPU tensor; bfloat16 as the uint16 of its bits."""
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def as_tensor(rows: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `as_array`."""
    tensor = torch.from_numpy(rows)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)

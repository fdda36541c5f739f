"""Hands the features of a stage over to other programs, in constant memory."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from layerwise.cache.reader import ActivationCache
from layerwise.errors import CacheError
from layerwise.files import unwritable

READ_BYTES = 32 * 2**20
"""Read at once."""

_BESIDE = 2**20
"""Bytes of the file beside the features, more or less."""


def export(cache: ActivationCache, path: Path, mean: bool = False) -> None:
    """View 0 of every sample as .npy or .h5, by the name of `path`; bfloat16 and int8 become float32.

    .npy: one array [frames of all samples, *frame shape]; which rows are whose is in NAME.index.npz beside it: `ids`
    [N], `offsets` int64 [N + 1] and labels. .h5: `features`, `offsets`, `ids` and `labels/NAME` in one file. mean: one
    row per sample instead of its frames, not-a-number where it has none. Raises CacheError where the file exists, the name
    has another ending, or the disk does not take it.
    """
    if path.suffix not in (".npy", ".h5"):
        raise CacheError(f"{path}: an export is a .npy or a .h5 file; name one of these.")
    index_path = path.with_suffix(".index.npz")
    for there in [path, index_path] if path.suffix == ".npy" else [path]:
        if there.exists():
            raise CacheError(f"{there} exists; delete it, or name another file.")
    counts = np.ones_like(cache.lengths) if mean else cache.lengths
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    dtype = np.dtype(np.float16 if cache.layout.dtype == "float16" and not mean else np.float32)
    shape = (int(offsets[-1]), *cache.frame_shape)
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:  # a full disk is met here: HDF5 would not survive it
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize + _BESIDE)
        if path.suffix == ".npy":
            with temporary.open("wb") as file:
                about = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, about)
                for rows in _rows(cache, mean):
                    file.write(rows.astype(dtype).tobytes())
            index = {f"labels_{name}": values.astype(str) for name, values in cache.labels.items()}
            np.savez(index_path, ids=np.array(cache.ids), offsets=offsets, **index)
        else:
            with h5py.File(temporary, "w") as file:
                features, row = file.create_dataset("features", shape, dtype), 0
                for rows in _rows(cache, mean):
                    features[row : row + len(rows)] = rows
                    row += len(rows)
                file["offsets"] = offsets
                file["ids"] = np.array([name.encode() for name in cache.ids])
                for name, values in cache.labels.items():
                    file[f"labels/{name}"] = np.array([value.encode() for value in values])
                file.attrs["stage"] = cache.layout.stage
        temporary.rename(path)
    except BaseException as error:
        for begun in (temporary, index_path) if path.suffix == ".npy" else (temporary,):
            begun.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CacheError(unwritable(path, error)) from None
        raise


def _rows(cache: ActivationCache, mean: bool) -> Iterator[np.ndarray]:
    """[n, *frame shape], piece by piece."""
    for sample, length in enumerate(cache.lengths.tolist()):
        if mean:
            total = np.zeros(cache.frame_shape)
            for piece in _pieces(cache, sample, length):
                total += piece.sum(0, dtype=np.float64)
            yield total[None] / length if length else np.full((1, *cache.frame_shape), np.nan)
        else:
            yield from _pieces(cache, sample, length)


def _pieces(cache: ActivationCache, sample: int, length: int) -> Iterator[np.ndarray]:
    """float32 [n, *frame shape], sample piece by piece; float16 as it is."""
    step = max(READ_BYTES // cache.layout.row_bytes, 1)
    for start in range(0, length, step):
        frames = cache.read(sample, start, min(start + step, length))
        yield (frames if cache.layout.dtype == "float16" else frames.float()).numpy()

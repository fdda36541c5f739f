"""Hands the features of a stage over to other programs, in constant memory."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from layerwise.cache.reader import ActivationCache
from layerwise.errors import CacheError

READ_BYTES = 32 * 2**20
"""Read at once."""


def export(cache: ActivationCache, path: Path, mean: bool = False) -> None:
    """View 0 of every sample as .npy or .h5, by the name of `path`; bfloat16 and int8 become float32.

    .npy: one array [frames of all samples, *frame shape]; which rows are whose is in NAME.index.npz beside it: `ids`
    [N], `offsets` int64 [N + 1] and labels. .h5: `features`, `offsets`, `ids` and `labels/NAME` in one file. mean: one
    row per sample instead of its frames. Raises CacheError where the file exists or the name has another ending.
    """
    if path.exists():
        raise CacheError(f"{path} exists; delete it, or name another file.")
    if path.suffix not in (".npy", ".h5"):
        raise CacheError(f"{path}: an export is a .npy or a .h5 file; name one of these.")
    counts = np.ones_like(cache.lengths) if mean else cache.lengths
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    dtype = np.dtype(np.float16 if cache.layout.dtype == "float16" and not mean else np.float32)
    shape = (int(offsets[-1]), *cache.frame_shape)
    temporary = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".npy":
            rows = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            _fill(rows, cache, mean)
            rows.flush()
            index = {f"labels_{name}": values for name, values in cache.labels.items()}
            np.savez(path.with_suffix(".index.npz"), ids=np.array(cache.ids), offsets=offsets, **index)
        else:
            with h5py.File(temporary, "w") as file:
                _fill(file.create_dataset("features", shape, dtype), cache, mean)
                file["offsets"] = offsets
                file["ids"] = np.array([name.encode() for name in cache.ids])
                for name, values in cache.labels.items():
                    file[f"labels/{name}"] = np.array([value.encode() for value in values])
                file.attrs["stage"] = cache.layout.stage
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _fill(rows: np.ndarray | h5py.Dataset, cache: ActivationCache, mean: bool) -> None:
    row = 0
    for sample, length in enumerate(cache.lengths.tolist()):
        if mean:
            rows[row] = sum(piece.sum(0, dtype=np.float64) for piece in _pieces(cache, sample, length)) / length
            row += 1
            continue
        for piece in _pieces(cache, sample, length):
            rows[row : row + len(piece)] = piece
            row += len(piece)


def _pieces(cache: ActivationCache, sample: int, length: int) -> Iterator[np.ndarray]:
    """float32 [n, *frame shape], sample piece by piece; float16 as it is."""
    step = max(READ_BYTES // cache.layout.row_bytes, 1)
    for start in range(0, length, step):
        frames = cache.read(sample, start, min(start + step, length))
        yield (frames if cache.layout.dtype == "float16" else frames.float()).numpy()

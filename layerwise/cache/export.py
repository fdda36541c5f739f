"""Writes the features of samples to a file for other programs, sample after sample in constant memory.

NAME.npy: one array [frames of all samples, *frame shape]; which rows are whose is in NAME.index.npz beside it: `ids` [N],
`offsets` int64 [N + 1] and `labels_NAME`. NAME.h5: `features`, `offsets`, `ids` and `labels/NAME` in one file.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from layerwise.cache.hdf5_file import writable
from layerwise.cache.layout import as_bytes
from layerwise.cache.reader import ActivationCache
from layerwise.errors import CacheError
from layerwise.files import errors_of_writing, open_new, write_atomically

READ_BYTES = 32 * 2**20
"""Read at once."""


def export(cache: ActivationCache, path: Path, mean: bool = False) -> None:
    """View 0 of every sample as .npy or .h5, by the name of `path`; bfloat16 and int8 become float32.

    mean: one row per sample instead of its frames. Raises CacheError where the file exists or the name has another ending.
    """
    dtype = np.dtype(np.float16 if cache.layout.dtype == "float16" else np.float32)
    kind = MeanFile if mean else FeatureFile
    with kind(path, cache.frame_shape, dtype, cache.layout.stage) as file:
        for sample, (name, length) in enumerate(zip(cache.ids, cache.lengths.tolist(), strict=True)):
            for piece in _pieces(cache, sample, length):
                file.append(piece)
            file.keep(name)
        file.finish(cache.labels)


def _pieces(cache: ActivationCache, sample: int, length: int) -> Iterator[np.ndarray]:
    """float32 [n, *frame shape], sample piece by piece; float16 as it is."""
    step = max(READ_BYTES // cache.layout.row_bytes, 1)
    for start in range(0, length, step):
        frames = cache.read(sample, start, min(start + step, length))
        yield (frames if cache.layout.dtype == "float16" else frames.float()).numpy()


CHUNK_BYTES = 2**20
"""Of a chunk of the array in an HDF5 file: rows are added to it, so it cannot be contiguous."""


class FeatureFile:
    """Takes the rows of one sample after another; the file bears its name once it is whole, and is gone otherwise."""

    def __init__(self, path: Path, frame_shape: tuple[int, ...], dtype: np.dtype, stage: int) -> None:
        """Raises CacheError where the file exists, another process is writing it, or the name has another ending."""
        if path.suffix not in (".npy", ".h5"):
            raise CacheError(f"{path}: features go into a .npy or a .h5 file; name one of these.")
        if not path.parent.is_dir():
            raise CacheError(f"{path}: there is no folder {path.parent}; make it, or name another one.")
        self.rows = 0
        """Written so far, those of the sample in hand included."""
        self._path, self._temporary = path, path.with_name(path.name + ".part")
        self._ids: list[str] = []
        self._offsets = [0]
        index = [_index_of(path)] if path.suffix == ".npy" else []
        _refuse_existing(path)
        busy = CacheError(f"Another process is writing {path}; wait for it, or name another file.")
        with errors_of_writing(path, CacheError):
            self._file = open_new(self._temporary, busy, leftovers=index)
        array = _NpyArray if path.suffix == ".npy" else _HDF5Array
        try:
            for there in (path, *index):
                _refuse_existing(there)
            with errors_of_writing(path, CacheError):
                self._array: _NpyArray | _HDF5Array = array(self._file, frame_shape, np.dtype(dtype), stage)
        except BaseException:
            self._let_go()
            raise

    def append(self, rows: np.ndarray) -> None:
        """The next rows [n, *frame shape] of the sample in hand. Raises CacheError where the disk does not take them."""
        with errors_of_writing(self._path, CacheError):
            self._array.write(self.rows, rows)
        self.rows += len(rows)

    def keep(self, name: str) -> None:
        """Ends the sample in hand."""
        self._ids.append(name)
        self._offsets.append(self.rows)

    def drop(self) -> None:
        """Takes the rows of the sample in hand back."""
        self.rows = self._offsets[-1]

    def finish(self, labels: Mapping[str, np.ndarray]) -> None:
        """Adds the index, and puts the file in place. labels: label name to str [N], for the samples that were kept."""
        with errors_of_writing(self._path, CacheError):
            self._array.finish(self.rows, self._path, self._ids, np.array(self._offsets, dtype=np.int64), labels)
            self._temporary.rename(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._array.close()
        self._let_go()

    def _let_go(self) -> None:
        self._temporary.unlink(missing_ok=True)  # before the lock is given up: afterwards it would be another's
        with suppress(OSError):  # a buffer that the disk did not take
            self._file.close()


def _index_of(path: Path) -> Path:
    return path.with_suffix(".index.npz")


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise CacheError(f"{path} exists; delete it, or name another file.")


class MeanFile(FeatureFile):
    """One row per sample instead: the mean of its frames, float32; not-a-number where it has none."""

    def __init__(self, path: Path, frame_shape: tuple[int, ...], dtype: np.dtype, stage: int) -> None:
        super().__init__(path, frame_shape, np.dtype(np.float32), stage)
        self._shape = frame_shape
        self._forget()

    def append(self, rows: np.ndarray) -> None:
        self._sum += rows.sum(0, dtype=np.float64)
        self._count += len(rows)

    def keep(self, name: str) -> None:
        with np.errstate(invalid="ignore"):
            super().append((self._sum / self._count)[None])
        self._forget()
        super().keep(name)

    def drop(self) -> None:
        self._forget()
        super().drop()

    def _forget(self) -> None:
        self._sum, self._count = np.zeros(self._shape), 0


class _NpyArray:
    """Rows behind a header that is written anew at the end; numpy leaves room in it for the first axis to grow."""

    def __init__(self, file: BinaryIO, frame_shape: tuple[int, ...], dtype: np.dtype, stage: int) -> None:
        self._file, self._shape, self._dtype = file, frame_shape, dtype
        self._write_header(0)
        self._start = self._file.tell()

    def write(self, row: int, rows: np.ndarray) -> None:
        self._file.seek(self._start + row * math.prod(self._shape) * self._dtype.itemsize)
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)

    def finish(
        self, rows: int, path: Path, ids: Sequence[str], offsets: np.ndarray, labels: Mapping[str, np.ndarray]
    ) -> None:
        self._file.truncate(self._start + rows * math.prod(self._shape) * self._dtype.itemsize)
        self._file.seek(0)
        self._write_header(rows)
        self._file.flush()
        index: dict[str, Any] = {f"labels_{name}": values.astype(str) for name, values in labels.items()}
        content = BytesIO()
        np.savez(content, ids=np.array(ids), offsets=offsets, **index)
        write_atomically(_index_of(path), content.getbuffer())

    def close(self) -> None:
        pass

    def _write_header(self, rows: int) -> None:
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, described | {"shape": (rows, *self._shape)})


class _HDF5Array:
    """Rows in chunks."""

    def __init__(self, file: BinaryIO, frame_shape: tuple[int, ...], dtype: np.dtype, stage: int) -> None:
        chunk = max(CHUNK_BYTES // (math.prod(frame_shape) * dtype.itemsize), 1)
        with ExitStack() as opened:
            self._file, self._target = opened.enter_context(writable(file.fileno(), "w"))
            self._file.attrs["stage"] = stage
            self._rows = self._file.create_dataset(
                "features", (0, *frame_shape), dtype, maxshape=(None, *frame_shape), chunks=(chunk, *frame_shape)
            )
            self._opened = opened.pop_all()

    def write(self, row: int, rows: np.ndarray) -> None:
        self._rows.resize(row + len(rows), axis=0)
        self._rows[row:] = rows
        self._target.raise_if_failed()

    def finish(
        self, rows: int, path: Path, ids: Sequence[str], offsets: np.ndarray, labels: Mapping[str, np.ndarray]
    ) -> None:
        self._rows.resize(rows, axis=0)
        self._file["offsets"] = offsets
        self._file["ids"] = as_bytes(ids)
        for name, values in labels.items():
            self._file[f"labels/{name}"] = as_bytes(values)
        self._opened.close()

    def close(self) -> None:
        with suppress(OSError):  # told by now, or of a file that is given up
            self._opened.close()

"""Writes the features of samples to a file for other programs, sample after sample; see feature_formats.py."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np

from layerwise.cache.feature_formats import FORMATS, Index, RowPlaces, index_of, part_of, whole_of
from layerwise.cache.reader import ActivationCache
from layerwise.errors import CacheError
from layerwise.files import errors_of_writing, open_new

READ_BYTES = 32 * 2**20
"""Read at once."""


def export(cache: ActivationCache, path: Path, mean: bool = False, places: RowPlaces | None = None) -> None:
    """View 0 of every sample as .npy, .h5, .npz or .parquet, by the name of `path`; bfloat16 and int8 become float32.

    mean: one row per sample instead of its frames. places: where the frames lie, if that is known. Raises CacheError where the
    file exists or the name has another ending.
    """
    dtype = np.dtype(np.float16 if cache.layout.dtype == "float16" else np.float32)
    kind = MeanFile if mean else FeatureFile
    with kind(path, cache.frame_shape, dtype, cache.layout.stage, places) as file:
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


class FeatureFile:
    """Takes the rows of one sample after another; the file bears its name once it is whole, and is gone otherwise."""

    def __init__(
        self,
        path: Path,
        frame_shape: tuple[int, ...],
        dtype: np.dtype,
        stage: int,
        places: RowPlaces | None = None,
    ) -> None:
        """places: where the rows of a sample lie, if that is known.

        Raises CacheError where the file exists, another process is writing it, or the name has another ending.
        """
        if path.suffix not in FORMATS:
            raise CacheError(f"{path}: features go into a file that ends in {', '.join(FORMATS)}; name one of these.")
        if not path.parent.is_dir():
            raise CacheError(f"{path}: there is no folder {path.parent}; make it, or name another one.")
        self.rows = 0
        """Written so far, those of the sample in hand included."""
        self._path, self._temporary, self._places = path, part_of(path), places
        self._ids: list[str] = []
        self._offsets = [0]
        index = [index_of(path)] if path.suffix == ".npy" else []
        _refuse_existing(path)
        busy = CacheError(f"Another process is writing {path}; wait for it, or name another file.")
        with errors_of_writing(path, CacheError):
            self._file = open_new(self._temporary, busy, leftovers=[*index, whole_of(path)])
        try:
            for there in (path, *index):
                _refuse_existing(there)
            with errors_of_writing(path, CacheError):
                self._array = FORMATS[path.suffix](self._file, frame_shape, np.dtype(dtype), stage)
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
        index = Index(self._ids, np.array(self._offsets, dtype=np.int64), labels, self._places)
        with errors_of_writing(self._path, CacheError):
            self._array.finish(self._path, index)
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


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise CacheError(f"{path} exists; delete it, or name another file.")


class MeanFile(FeatureFile):
    """One row per sample instead: the mean of its frames, float32; not-a-number where it has none."""

    def __init__(
        self,
        path: Path,
        frame_shape: tuple[int, ...],
        dtype: np.dtype,
        stage: int,
        places: RowPlaces | None = None,
    ) -> None:
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

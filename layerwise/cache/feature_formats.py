"""Files of features in the formats that other programs read: rows first, what they are at the end, in constant memory.

NAME.npy: one array [rows of all samples, *frame shape]; NAME.index.npz beside it says which rows are whose. NAME.h5 and
NAME.npz hold both. NAME.parquet: a table with a line for each row. What is said of the rows, under these names: `ids` [N],
`offsets` int64 [N + 1], `labels_NAME` (in HDF5 `labels/NAME`); where a row is a frame, `hop`, `offset` and `unit`, and
`frame_times` float64 [rows] in seconds, or `frame_places`: [rows] in steps, [rows, 2] in pixels, down and across.
"""

import importlib
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from layerwise.cache.hdf5_file import writable
from layerwise.cache.layout import as_bytes
from layerwise.errors import CacheError
from layerwise.files import replace_atomically

CHUNK_BYTES = 2**20
"""Of a chunk of the array in an HDF5 file: rows are added to it, so it cannot be contiguous."""

TABLE_VALUES = 2**22
"""Of a part of a Parquet table."""


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Where the rows of a sample lie along it: row t is centred on offset + hop * t."""

    hop: float
    offset: float
    unit: str
    """seconds, steps, or pixels: then rows lie in a grid, row after row of it, and have two places, down and across."""
    columns: int = 1
    """Of the grid."""

    @property
    def name(self) -> str:
        """Under which they are stored."""
        return "frame_times" if self.unit == "seconds" else "frame_places"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the place of a row."""
        return (2,) if self.unit == "pixels" else ()

    def of(self, rows: np.ndarray) -> np.ndarray:
        """float64 [n], or [n, 2], of rows int64 [n] of a sample."""
        if self.unit == "pixels":
            rows = np.stack([rows // self.columns, rows % self.columns], axis=1)
        return self.offset + self.hop * rows.astype(np.float64)


@dataclass(frozen=True, slots=True)
class Index:
    """What the rows of a file are."""

    ids: Sequence[str]
    """[N]"""
    offsets: np.ndarray
    """int64 [N + 1], rows where the samples begin."""
    labels: Mapping[str, np.ndarray]
    """Label name to str [N]"""
    places: RowPlaces | None
    """None where a row is a whole sample."""

    @property
    def rows(self) -> int:
        """Of all samples."""
        return int(self.offsets[-1])

    def row_places(self) -> Iterator[np.ndarray]:
        """Of all rows, sample after sample."""
        assert self.places is not None
        for length in np.diff(self.offsets).tolist():
            yield self.places.of(np.arange(length))


class NpyRows:
    """Rows behind a header that is written anew at the end; numpy leaves room in it for the first axis to grow."""

    def __init__(self, file: BinaryIO, frame_shape: tuple[int, ...], dtype: np.dtype, stage: int) -> None:
        self._file, self._shape, self._dtype, self._stage = file, frame_shape, dtype, stage
        self._write_header(0)
        self._start = self._file.tell()

    def write(self, row: int, rows: np.ndarray) -> None:
        self._file.seek(self._start + row * math.prod(self._shape) * self._dtype.itemsize)
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)

    def finish(self, path: Path, index: Index) -> None:
        self._end(index)

        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w") as archive:
                _write_index(archive, index)

        replace_atomically(index_of(path), write)

    def close(self) -> None:
        pass

    def _end(self, index: Index) -> None:
        self._file.truncate(self._start + index.rows * math.prod(self._shape) * self._dtype.itemsize)
        self._file.seek(0)
        self._write_header(index.rows)
        self._file.flush()

    def _write_header(self, rows: int) -> None:
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, described | {"shape": (rows, *self._shape)})


class NpzRows(NpyRows):
    """Rows that are put into an archive when all are known."""

    def finish(self, path: Path, index: Index) -> None:
        self._end(index)
        with _in_place_of_rows(path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("features.npy", "w", force_zip64=True) as member:
                self._file.seek(0)
                shutil.copyfileobj(self._file, member, CHUNK_BYTES)
            _write_index(archive, index)


class HDF5Rows:
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

    def finish(self, path: Path, index: Index) -> None:
        self._rows.resize(index.rows, axis=0)
        self._file["offsets"] = index.offsets
        self._file["ids"] = as_bytes(index.ids)
        for name, values in index.labels.items():
            self._file[f"labels/{name}"] = as_bytes(values)
        if places := index.places:
            self._file.attrs.update({"hop": places.hop, "offset": places.offset, "unit": places.unit})
            stored, row = self._file.create_dataset(places.name, (index.rows, *places.shape), "f8"), 0
            for of_sample in index.row_places():
                stored[row : row + len(of_sample)] = of_sample
                row += len(of_sample)
        self._opened.close()

    def close(self) -> None:
        with suppress(OSError):  # told by now, or of a file that is given up
            self._opened.close()


class ParquetRows(NpyRows):
    """Rows that are put into a table when all are known: id, frame, its place, features and the labels of the sample."""

    def __init__(self, file: BinaryIO, frame_shape: tuple[int, ...], dtype: np.dtype, stage: int) -> None:
        """Raises CacheError where pyarrow is missing."""
        self._arrow = _import("pyarrow")
        self._parquet = _import("pyarrow.parquet")
        super().__init__(file, frame_shape, dtype, stage)

    def finish(self, path: Path, index: Index) -> None:
        self._end(index)
        channels = math.prod(self._shape)
        said = {"stage": str(self._stage), "frame_shape": "x".join(map(str, self._shape))}
        if places := index.places:
            said |= {"hop": str(places.hop), "offset": str(places.offset), "unit": places.unit}
        schema = self._table(np.empty((0, channels), self._dtype), index, 0).schema.with_metadata(said)
        step = max(TABLE_VALUES // channels, 1)
        with _in_place_of_rows(path) as file, self._parquet.ParquetWriter(file, schema) as writer:
            for row in range(0, index.rows, step):
                self._file.seek(self._start + row * channels * self._dtype.itemsize)
                content = self._file.read(step * channels * self._dtype.itemsize)
                rows = np.frombuffer(content, self._dtype).reshape(-1, channels)
                writer.write_table(self._table(rows, index, row).cast(schema))

    def _table(self, values: np.ndarray, index: Index, first: int) -> Any:
        """values: rows [n, C] from `first` on."""
        arrow, rows = self._arrow, np.arange(first, first + len(values))
        samples = np.searchsorted(index.offsets, rows, side="right") - 1
        columns: dict[str, Any] = {"id": arrow.array(np.array(index.ids, dtype=object)[samples], arrow.string())}
        if places := index.places:
            frames = rows - index.offsets[samples]
            columns["frame"] = arrow.array(frames)
            names = {"seconds": ["time"], "steps": ["step"], "pixels": ["down", "across"]}[places.unit]
            found = places.of(frames).reshape(len(rows), len(names))
            columns |= {name: arrow.array(found[:, number]) for number, name in enumerate(names)}
        flat = arrow.array(values.astype(np.float32).ravel())  # few programs read halves
        columns["features"] = arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        for name, of_samples in index.labels.items():
            known = np.array([value or None for value in of_samples.tolist()], dtype=object)
            columns[f"label_{name}"] = arrow.array(known[samples], arrow.string())
        return arrow.table(columns)


Rows = NpyRows | HDF5Rows
FORMATS: dict[str, type[NpyRows] | type[HDF5Rows]] = {
    ".npy": NpyRows,
    ".h5": HDF5Rows,
    ".npz": NpzRows,
    ".parquet": ParquetRows,
}
"""By the ending of the file."""


def index_of(path: Path) -> Path:
    """The file that says what lies in an .npy."""
    return path.with_suffix(".index.npz")


def part_of(path: Path) -> Path:
    """The file while rows are written to it."""
    return path.with_name(path.name + ".part")


def whole_of(path: Path) -> Path:
    """What is made of the rows when all are known, while it is written."""
    return path.with_name(path.name + ".whole")


@contextmanager
def _in_place_of_rows(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of the rows when it is whole, and is gone otherwise."""
    whole = whole_of(path)
    try:
        with whole.open("xb") as file:
            yield file
        os.replace(whole, part_of(path))
    finally:
        whole.unlink(missing_ok=True)


def _write_index(archive: zipfile.ZipFile, index: Index) -> None:
    arrays: dict[str, Any] = {"ids": np.array(index.ids), "offsets": index.offsets}
    arrays |= {f"labels_{name}": values.astype(str) for name, values in index.labels.items()}
    places = index.places
    if places:
        arrays |= {"hop": places.hop, "offset": places.offset, "unit": places.unit}
    for name, values in arrays.items():
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.asanyarray(values), allow_pickle=False)
    if places:
        with archive.open(f"{places.name}.npy", "w", force_zip64=True) as member:
            described = {"descr": "<f8", "fortran_order": False, "shape": (index.rows, *places.shape)}
            np.lib.format.write_array_header_1_0(member, described)
            for of_sample in index.row_places():
                member.write(of_sample.astype("<f8").tobytes())


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CacheError(
            f"Parquet needs pyarrow ({error}); pip install 'layerwise[parquet]', or name an .npz."
        ) from None

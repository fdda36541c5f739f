"""Arrays as samples: .npy and HDF5 files, and anything else that can be cut into samples by number.

Samples of steps [L, C, ...] may differ in length; whole samples [C, ...] have one shape. All are divided by one number, so
that the mean square over the set is 1, as recordings are."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from layerwise.data.source import SampleSet, Skipped, digest
from layerwise.errors import DataError, LayerwiseError
from layerwise.files import check_readable

LEVEL_SAMPLES = 200
"""The level of a set is measured on this many samples, spread over it."""

LEVEL_VALUES = 2**20
"""And on so many values of each."""

ABSURD = 10**6
"""A sample with values so many times as large as those of the others is left out: it would set the level of them all."""

FEWEST_TO_COMPARE = 3
"""Samples; of two that differ so much, either may be the odd one."""

MOST_LOOKED_AT = 2**27
"""Values of a set in which all are looked at; of a larger one those alone by which its level is measured."""

PROBES, PROBE_BYTES = 64, 2**16
"""Places of a file, and bytes at each, that tell it from others of the same size."""

BESIDE_BYTES = 2**32
"""Most that what says what lies in an array may take in memory."""

BESIDE = ("offsets", "ids", "labels", "frame_times", "frame_places")
"""Data sets of a file that say what lies in the others."""


def measure_level(data: SampleSet) -> float:
    """Root of the mean square over samples spread evenly over the set. Raises DataError where nothing can be learnt."""
    squares, count = 0.0, 0
    if min(data.frame_shape) < 1 or not data.lengths.size or data.lengths.max() < 1:
        raise DataError(f"These data are empty: frames of {data.frame_shape}, {len(data.lengths)} samples.")
    for sample, steps in _for_the_level(data):
        values = np.asarray(data.read_values(sample, 0, steps, 0), dtype=np.float64)
        squares, count = squares + float(np.square(values).sum()), count + values.size
    if not math.isfinite(squares):
        raise DataError("These data hold values that are no numbers; mend them.")
    if squares == 0:
        raise DataError("These data are zero everywhere; there is nothing to learn from them.")
    return math.sqrt(squares / count)


def _for_the_level(data: SampleSet) -> list[tuple[int, int]]:
    """Samples, and how many steps of each."""
    steps = max(LEVEL_VALUES // max(math.prod(data.frame_shape), 1), 1)
    chosen = np.unique(np.linspace(0, len(data.lengths) - 1, LEVEL_SAMPLES).astype(int))
    return [(sample, min(int(data.lengths[sample]), steps)) for sample in chosen.tolist()]


def _peaks(data: SampleSet, array: Any, offsets: np.ndarray | None) -> dict[int, float]:
    """Samples that were looked at to their largest absolute values. Raises DataError where one is no number.

    array, offsets: what the data are made of, see `FileArrays`.
    """
    peaks = {}
    with np.errstate(over="ignore"):  # what is too large for float32 is no number there
        if array.size <= MOST_LOOKED_AT:
            rows = max(LEVEL_VALUES // max(math.prod(array.shape[1:]), 1), 1)
            blocks = [_largest(array[first : first + rows]) for first in range(0, len(array), rows)]
            of_rows = np.concatenate([*blocks, np.zeros(0)])
            ends = range(len(of_rows) + 1) if offsets is None else offsets.tolist()
            peaks = {n: float(of_rows[a:b].max(initial=0)) for n, (a, b) in enumerate(pairwise(ends))}
        else:
            for sample, steps in _for_the_level(data):
                peaks[sample] = float(_largest(data.read_values(sample, 0, steps, 0)).max(initial=0))
    for sample, peak in peaks.items():
        if not math.isfinite(peak):
            raise DataError(f"Sample {data.ids[sample]} holds values that are no numbers; mend it or leave it out.")
    return peaks


def _largest(values: np.ndarray) -> np.ndarray:
    """Absolute value in each row, float32 [n]."""
    values = np.abs(np.asarray(values, dtype=np.float32))
    return values.max(axis=tuple(range(1, values.ndim)), initial=0)


def without_absurd(data: SampleSet, peaks: Mapping[int, float]) -> SampleSet:
    """Without samples whose values are far beyond those of the others. peaks: samples to their largest absolute values."""
    above_zero = sorted(peak for peak in peaks.values() if peak)
    usual = above_zero[(len(above_zero) - 1) // 2] if len(above_zero) >= FEWEST_TO_COMPARE else math.inf
    absurd = {sample: peak for sample, peak in peaks.items() if peak > ABSURD * usual}
    if not absurd:
        return data
    kept = np.array([sample for sample in range(len(data.ids)) if sample not in absurd])
    reasons = {
        sample: f"its values reach {peak:.3g}, those of the others about {usual:.3g}" for sample, peak in absurd.items()
    }
    return replace(
        data,
        ids=[data.ids[sample] for sample in kept.tolist()],
        lengths=data.lengths[kept],
        labels={name: values[kept] for name, values in data.labels.items()},
        read_values=lambda sample, *place: data.read_values(int(kept[sample]), *place),
        identity=digest(f"{data.identity} without {sorted(absurd)}"),
        skipped=[*data.skipped, *(Skipped(data.ids[sample], reason) for sample, reason in reasons.items())],
    )


@dataclass(frozen=True, slots=True)
class FileArrays:
    """What a file holds."""

    array: Any
    """[N, ...], or [rows of all samples, ...] where there are offsets; sliced along its first axis."""
    offsets: np.ndarray | None = None
    """int64 [N + 1]"""
    ids: Sequence[str] | None = None
    labels: dict[str, np.ndarray] = field(default_factory=dict)


def open_npy(path: Path, frames: str) -> SampleSet:
    """An array [N, ...] in a .npy file, read through a memory map; its index.npz beside it, as `layerwise extract` writes it,
    says where samples of different lengths lie. Raises DataError."""
    with _as_data_errors(path, "a .npy file of numbers"):
        check_readable(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        beside = path.with_suffix(".index.npz")
        found = _with_index(array, beside) if beside.exists() else FileArrays(array)
    return _array_set(found, frames, path)


def _with_index(array: np.ndarray, path: Path) -> FileArrays:
    check_readable(path, BESIDE_BYTES)
    with np.load(path, allow_pickle=False) as index:
        if sum(member.file_size for member in index.zip.infolist()) > BESIDE_BYTES:
            raise DataError(f"{path} unpacks to more than {BESIDE_BYTES:,} bytes; that is no index.")
        labels = {name.removeprefix("labels_"): index[name].astype(str) for name in index if name.startswith("labels_")}
        return FileArrays(array, index["offsets"], index["ids"].astype(str).tolist(), labels)


def open_h5(path: Path, name: str | None, frames: str) -> SampleSet:
    """A data set [N, ...] of an HDF5 file, with `offsets`, `ids` and the group `labels` beside it where they are there.

    name: of the data set; without it the only one that could be meant. Raises DataError; links to other files are refused.
    """
    with _as_data_errors(path, "an HDF5 file"):
        check_readable(path)
        found = _within(h5py.File(path, "r"), path, name)
    return _array_set(found, frames, path)


def _within(file: h5py.File, path: Path, name: str | None) -> FileArrays:
    top = _members(file, path)
    sets = [each for each in top if isinstance(file[each], h5py.Dataset) and each not in BESIDE and file[each].shape]
    if name is None and len(sets) != 1:
        raise DataError(
            f"{path} holds {', '.join(sets) or 'no data sets at its top'}; say which one is meant: --data h5:{path}:NAME."
        )
    *folders, last = (name or sets[0]).strip("/").split("/")
    beside: Any = file
    for folder in folders:
        beside = beside[folder] if folder in _members(beside, path) else None
        if not isinstance(beside, h5py.Group):
            raise DataError(f"{path} has no group {folder} on the way to {name}.")
    around = _members(beside, path)
    if last not in around or not isinstance(beside[last], h5py.Dataset) or not beside[last].shape:
        raise DataError(f"{path} has no data set {name}; it has {', '.join(sets) or 'none'}.")
    labels: Any = beside["labels"] if "labels" in around else None
    within = _members(labels, path) if isinstance(labels, h5py.Group) else []
    named = [("label", labels)] if isinstance(labels, h5py.Dataset) else [(each, labels[each]) for each in within]
    return FileArrays(
        _own_values(beside[last], path),
        _index(beside["offsets"], path)[()] if "offsets" in around else None,
        _text(_index(beside["ids"], path)).tolist() if "ids" in around else None,
        {label: _text(_index(values, path)) for label, values in named if isinstance(values, h5py.Dataset)},
    )


def _members(group: h5py.Group, path: Path) -> list[str]:
    """Names in a group. Raises DataError where one leads somewhere else."""
    for each in group:
        if not isinstance(group.get(each, getlink=True), h5py.HardLink):
            raise DataError(f"{path}: {each} is a link to somewhere else; copy what it means into the file.")
    return list(group)


def _own_values(values: Any, path: Path) -> h5py.Dataset:
    """Raises DataError where the values lie in other files."""
    if not isinstance(values, h5py.Dataset) or values.is_virtual or values.external:
        raise DataError(f"{path}: the values of {values.name} lie in other files, or nowhere; copy them into this one.")
    return values


def _index(values: Any, path: Path) -> h5py.Dataset:
    """Of what is read whole. Raises DataError as `_own_values` does, and where it is too large for an index."""
    if _own_values(values, path).nbytes > BESIDE_BYTES:
        raise DataError(f"{path}: {values.name} has more than {BESIDE_BYTES:,} bytes; that is no index of samples.")
    return values


def _text(values: h5py.Dataset) -> np.ndarray:
    return values.asstr()[()].astype(str) if h5py.check_string_dtype(values.dtype) else values[()].astype(str)


@contextmanager
def _as_data_errors(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"There is no file {path}; name one that holds an array.") from None
    except LayerwiseError as error:
        raise DataError(str(error)) from None
    except Exception as error:  # a damaged file makes numpy, zipfile and HDF5 raise nearly anything
        raise DataError(f"{path} cannot be read as {kind}: {error}.") from None


def _array_set(found: FileArrays, frames: str, path: Path) -> SampleSet:
    array, offsets = found.array, found.offsets
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path} holds {array.dtype}; arrays of numbers can be trained on.")
    shape = array.shape
    if len(shape) < (1 if offsets is not None else 2):
        raise DataError(f"{path} has the shape {shape}; give samples first: [samples, ...].")
    if offsets is not None and not _are_offsets(offsets, shape[0]):
        raise DataError(f"{path}: offsets must be whole numbers that rise from 0 on to at most the {shape[0]} rows.")
    count = shape[0] if offsets is None else len(offsets) - 1
    ids = found.ids or [str(number) for number in range(count)]
    wrong = next((name for name, values in found.labels.items() if len(values) != count), None)
    if wrong is not None or len(ids) != count:
        raise DataError(f"{path}: {wrong or 'ids'} must have one entry for each of the {count} samples.")
    if frames == "patches":
        raise DataError(f"{path}: arrays come in --frames steps or whole; for patches give pictures as files.")
    if frames == "whole" and offsets is not None:
        raise DataError(f"{path} holds samples of several lengths; give --frames steps.")
    if frames == "steps" and offsets is None:
        lengths, frame_shape, read = np.full(count, shape[1]), shape[2:], partial(_read_sequence, array)
    else:
        rows = np.arange(count + 1) if offsets is None else offsets  # a whole sample is one row
        lengths, frame_shape, read = np.diff(rows), shape[1:], partial(_read_rows, array, rows)
    known = {name: values.tolist() for name, values in found.labels.items()}
    described = [str(array.dtype), shape, frames, known, list(ids), lengths.tolist(), _contents(path)]
    data = SampleSet(
        takes="arrays",
        ids=ids,
        lengths=lengths.astype(np.int64),
        frame_shape=tuple(frame_shape) or (1,),
        identity=digest(json.dumps(described)),
        read_values=partial(_read_as_opened, path, path.stat().st_size, read),
        measure_level=measure_level,
        labels=found.labels,
    )
    return without_absurd(data, _peaks(data, array, offsets))


def _read_as_opened(path: Path, size: int, read: Callable[..., np.ndarray], *place: int) -> np.ndarray:
    """What `read` gives for the place. Raises DataError where the file is no longer what it was, with its name."""
    try:
        if path.stat().st_size != size:  # behind the end of a file that is mapped, the system ends the process
            raise OSError("it has another size than when it was opened")
        return read(*place)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} cannot be read any more ({error}); restore it.") from None


def _are_offsets(offsets: np.ndarray, rows: int) -> bool:
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype.kind not in "iu":
        return False
    return bool(offsets[0] >= 0 and (np.diff(offsets.astype(np.int64)) >= 0).all() and offsets[-1] <= rows)


def _contents(path: Path) -> list[Any]:
    """Size and a hash of places all over it: to go through all of a large file would take as long as an epoch."""
    size, contents = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for place in np.linspace(0, max(size - PROBE_BYTES, 0), PROBES).astype(int).tolist():
            file.seek(place)
            contents.update(file.read(PROBE_BYTES))
    return [size, contents.hexdigest()]


def _read_sequence(array: Any, sample: int, start: int, stop: int, view: int) -> np.ndarray:
    """Of an array [N, L, ...]."""
    return _in_channels(array[sample, start:stop])


def _read_rows(array: Any, offsets: np.ndarray, sample: int, start: int, stop: int, view: int) -> np.ndarray:
    """Of an array [rows, ...]; offsets: where each sample begins."""
    first = int(offsets[sample])
    return _in_channels(array[first + start : first + stop])


def _in_channels(steps: np.ndarray) -> np.ndarray:
    """[n] to [n, 1]: a step has channels, were it one."""
    return steps[:, None] if steps.ndim == 1 else steps

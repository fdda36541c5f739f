"""The file format of an activation cache, version 3. cache/README.md describes it for other readers.

One contiguous, unfiltered HDF5 data set `activations` [frames of all samples and views, *frame shape], frame-major, so
that a window is one contiguous read; allocated early, aligned, never filled. The file is created by h5py and closed;
rows then go in and out by pwrite and pread at the data set's place, at the speed of the disk and without HDF5's lock.
A compressed cache is chunked instead, see packing.py.
"""

import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import h5py
import numpy as np

from layerwise.cache import zstd
from layerwise.cache.layout import SPLITS, Layout
from layerwise.cache.seal import NAME, USER_BLOCK, VERSION, of_another_version
from layerwise.cache.stored import STORED
from layerwise.cache.structure import UNREADABLE, byte_range, check_structure, unusual
from layerwise.errors import UnusableCache

ALIGNMENT = 4096

LARGEST_BLOCK = 2**20
"""Bytes that a first read may have to read around a window."""

LIBVER = ("earliest", "v108")
"""A library version whose files carry no "open for write" mark: a kill while sealing would leave that mark behind, and HDF5
would never open the file again."""

_UNPACKED_LABELS = 64 * 2**20
"""Bytes that labels may take in memory even where the whole file is smaller."""


@dataclass(frozen=True, slots=True)
class Places:
    """First bytes, in the file, of what is read and written without HDF5."""

    activations: int
    stored_bytes: int
    """That the activations take."""
    checksums: int
    scales: int
    places: int


def create(path: Path, layout: Layout) -> None:
    """Creates the file with everything in it but the activations, their checksums, scales and places; not sealed."""
    index = _index(layout)
    with open(path, "wb") as file:  # HDF5 does not survive a disk that is full
        os.posix_fallocate(file.fileno(), 0, sum(values.nbytes + 2 * ALIGNMENT for values in index.values()))
    with h5py.File(
        path,
        "w",
        libver=LIBVER,
        userblock_size=USER_BLOCK,
        alignment_threshold=ALIGNMENT,
        alignment_interval=ALIGNMENT,
    ) as file:
        file.attrs["format"] = np.bytes_(NAME)
        file.attrs["format_version"] = np.int64(VERSION)
        file.attrs["complete"] = np.uint8(0)
        for name in ("fingerprint", "dtype", "compression"):
            file.attrs[name] = np.bytes_(getattr(layout, name))
        for name in ("stage", "columns", "views", "hop", "block_bytes", "scale_rows"):
            file.attrs[name] = np.int64(getattr(layout, name))
        file.attrs["offset"] = np.float64(layout.offset)
        for name, values in index.items():
            file.create_dataset(name, data=values, track_times=False)  # the same content is the same bytes
        _create_unfilled(file, layout)


def read_layout(path: Path, descriptor: int) -> tuple[Layout, Places]:
    """The layout of a cache file, sealed or not, and where things lie in it. `path` is only for the errors.

    Raises UnusableCache where the file contradicts itself, or holds what layerwise never writes.
    """
    try:
        # Through the descriptor: of the very file whose seal was checked, and whoever else has it open in this process.
        with FileIO(descriptor, closefd=False) as content, h5py.File(content, "r") as file:
            check_structure(path, file, os.fstat(descriptor).st_size)
            if file.attrs["format_version"] != VERSION:
                raise of_another_version(path, str(file.attrs["format_version"]))
            layout = _read(path, file)
            places = _places(file, layout)
    except UNREADABLE as error:
        raise UnusableCache(
            path, f"{path} is not a readable cache ({error}); delete it and start the run again to rebuild it."
        ) from None
    return layout, places


def set_complete(path: Path) -> None:
    """Marks the file as complete. Doing it twice gives the same bytes. Raises OSError."""
    with h5py.File(path, "r+", locking=False) as file:
        file.attrs.modify("complete", np.uint8(1))


def reserve(path: Path, layout: Layout, places: Places) -> None:
    """Claims the room of all activations, so that a full disk is met before the first row. Raises OSError."""
    if layout.activation_bytes:
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), places.activations, layout.activation_bytes)


def _read(path: Path, file: h5py.File) -> Layout:
    attrs, shape = file.attrs, file["activations"].shape
    numbers = {name: int(attrs[name]) for name in ("stage", "columns", "views", "hop", "block_bytes", "scale_rows")}
    for name, number in numbers.items():
        if number < 1 or (name == "block_bytes" and number > LARGEST_BLOCK):
            raise unusual(path, f"attribute {name}")
    ids, split, offsets = file["ids"][:], file["split"][:], file["offsets"][:]
    views = numbers["views"]
    if ids.ndim != 1 or offsets.shape != (len(ids) * views + 1,) or (offsets[1:] < offsets[:-1]).any():
        raise unusual(path, "offsets")
    lengths = np.diff(offsets)[::views]
    layout = Layout(
        fingerprint=attrs["fingerprint"].decode(),
        dtype=attrs["dtype"].decode(),
        frame_shape=shape[1:],
        lengths=lengths,
        ids=tuple(name.decode() for name in ids),
        split=split,
        labels=_read_labels(path, file, "labels", len(ids)),
        frame_labels=_read_labels(path, file, "frame_labels", int(lengths.sum())),
        offset=float(attrs["offset"]),
        compression=attrs["compression"].decode(),
        **numbers,
    )
    if len(shape) < 2 or 0 in shape[1:] or shape[0] != layout.rows:
        raise unusual(path, "activations")
    as_it_should_be = {
        "offsets": np.array_equal(layout.offsets, offsets),
        "split": split.shape == (len(ids),) and bool((split < len(SPLITS)).all()),
        "activations": file["activations"].chunks == _chunk_shape(layout),
        "attribute block_bytes": layout.compression == "none" or layout.block_bytes % layout.row_bytes == 0,
        "places": file["places"].shape == _places_shape(layout),
        "checksums": file["checksums"].shape == (layout.blocks,),
        "scales": file["scales"].shape == layout.scales_shape,
    }
    for name, good in as_it_should_be.items():
        if not good:
            raise unusual(path, name)
    return layout


def _places(file: h5py.File, layout: Layout) -> Places:
    if layout.compression == "none":
        first, size = byte_range(file["activations"].id)
    else:
        first, last = file["places"][:1].item(), file["places"][-1:].item()
        size = last - first
    checksums, scales, places = (byte_range(file[name].id)[0] for name in ("checksums", "scales", "places"))
    return Places(first, size, checksums, scales, places)


def _read_labels(path: Path, file: h5py.File, group: str, count: int) -> dict[str, np.ndarray]:
    """Label name to str [count]."""
    labels = {}
    for name in file.get(group, ()):
        codes, classes = file[f"{group}/{name}"][:], file[f"{group}_classes/{name}"][:]
        fits = codes.shape == (count,) and classes.ndim == 1 and ((codes >= 0) & (codes < len(classes))).all()
        unpacked = 4 * classes.itemsize * count  # numpy takes 4 bytes for a letter
        if not fits or unpacked > max(file.id.get_filesize(), _UNPACKED_LABELS):
            raise unusual(path, f"{group}/{name}")
        labels[name] = np.array([label.decode() for label in classes], dtype=str)[codes]
    return labels


def _index(layout: Layout) -> dict[str, np.ndarray]:
    """Every data set but the activations, by name."""
    index = {
        "offsets": layout.offsets,
        "ids": _as_bytes(layout.ids),
        "split": layout.split.astype(np.uint8),
        "checksums": np.zeros(layout.blocks, dtype=np.uint32),
        "scales": np.zeros(layout.scales_shape, dtype=np.float32),
        "places": np.zeros(_places_shape(layout), dtype=np.int64),
    }
    for group, labels in (("labels", layout.labels), ("frame_labels", layout.frame_labels)):
        for name, values in labels.items():
            classes, codes = np.unique(values, return_inverse=True)
            index[f"{group}/{name}"] = codes.astype(np.int32)
            index[f"{group}_classes/{name}"] = _as_bytes(classes)
    return index


def _create_unfilled(file: h5py.File, layout: Layout) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    dtype = np.dtype(STORED[layout.dtype].on_disk)
    if layout.compression == "none":
        creation.set_layout(h5py.h5d.CONTIGUOUS)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    else:
        creation.set_chunk(_chunk_shape(layout))
        if dtype.itemsize > 1:
            creation.set_shuffle()
        creation.set_filter(zstd.FILTER, h5py.h5z.FLAG_OPTIONAL, (zstd.LEVEL,))  # else HDF5 wants to have it, too
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    space = h5py.h5s.create_simple((layout.rows, *layout.frame_shape))
    h5py.h5d.create(file.id, b"activations", h5py.h5t.py_create(dtype), space, dcpl=creation)


def _chunk_shape(layout: Layout) -> tuple[int, ...] | None:
    """None where the activations are contiguous."""
    return None if layout.compression == "none" else (layout.block_bytes // layout.row_bytes, *layout.frame_shape)


def _places_shape(layout: Layout) -> tuple[int]:
    return (0,) if layout.compression == "none" else (layout.blocks + 1,)


def _as_bytes(names: tuple[str, ...] | np.ndarray) -> np.ndarray:
    return np.array([name.encode() for name in names], dtype=bytes)

"""The file format of an activation cache, version 4. cache/README.md describes it for other readers.

One contiguous, unfiltered HDF5 data set `activations` [frames of all samples and views, *frame shape], frame-major, so
that a window is one contiguous read; allocated early, aligned, never filled. The file is created by h5py and closed;
rows then go in and out by pwrite and pread at the data set's place, at the speed of the disk and without HDF5's lock.
A compressed cache is chunked instead, see packing.py.
"""

import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from layerwise.cache import zstd
from layerwise.cache.dtypes import STORED
from layerwise.cache.hdf5_file import writable
from layerwise.cache.layout import SPLITS, Layout, Places, as_bytes
from layerwise.cache.seal import NAME, USER_BLOCK, VERSION, of_another_version
from layerwise.cache.structure import NUMBERS, STRINGS, UNREADABLE, byte_range, check_structure, unusual
from layerwise.errors import CacheError, UnusableCache
from layerwise.files import open_new, open_own

ALIGNMENT = 4096

LARGEST_BLOCK = 2**20
"""Bytes that a first read may have to read around a window."""

LIBVER = ("earliest", "v108")
"""A library version whose files carry no "open for write" mark: a kill while sealing would leave that mark behind, and HDF5
would never open the file again."""


_CREATION: dict[str, Any] = {
    "libver": LIBVER,
    "userblock_size": USER_BLOCK,
    "alignment_threshold": ALIGNMENT,
    "alignment_interval": ALIGNMENT,
}


def create(path: Path, layout: Layout) -> None:
    """Makes the file anew, with everything in it but activations, checksums, scales, places and labels of frames; not sealed.

    Raises OSError, and CacheError where another process makes it.
    """
    busy = CacheError(f"Another process is writing {path}; wait for it.")
    with open_new(path, busy) as made, writable(made.fileno(), "w", **_CREATION) as (file, _):
        file.attrs["format"] = np.bytes_(NAME)
        file.attrs["format_version"] = np.int64(VERSION)
        file.attrs["complete"] = np.uint8(0)
        for name in STRINGS:
            file.attrs[name] = np.bytes_(getattr(layout, name))
        for name in NUMBERS:
            file.attrs[name] = np.int64(getattr(layout, name))
        file.attrs["offset"] = np.float64(layout.offset)
        for name, values in _index(layout).items():
            file.create_dataset(name, data=values, track_times=False)  # the same content is the same bytes
        for name, (dtype, shape) in _tables(layout).items():
            _create_unfilled(file, name, np.dtype(dtype), shape, _contiguous())
        _create_activations(file, layout)


def file_bytes(layout: Layout) -> int:
    """Most that a file of this layout takes, where it is not compressed."""
    index, tables = _index(layout), _tables(layout)
    beside = sum(values.nbytes for values in index.values())
    beside += sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in tables.values())
    # HDF5's own: a header for each data set, and what aligning it skips.
    own = 2**16 + 2 * ALIGNMENT * (len(index) + len(tables))
    return layout.activation_bytes + beside + own


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
        raise UnusableCache(path, f"{path} is not a readable cache ({error})") from None
    return layout, places


def set_complete(path: Path) -> None:
    """Marks the file as complete. Doing it twice gives the same bytes. Raises OSError."""
    with open_own(path) as whole, writable(whole.fileno(), "r+") as (file, _):
        file.attrs.modify("complete", np.uint8(1))


def reserve(path: Path) -> None:
    """Claims the room of the whole file, so that a full disk is met before the first row. Raises OSError."""
    with open_own(path) as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def _read(path: Path, file: h5py.File) -> Layout:
    def require(name: str, good: bool) -> None:
        if not good:
            raise unusual(path, name)

    def classes(name: str) -> tuple[str, ...]:
        require(name, file[name].ndim == 1)
        return tuple(label.decode() for label in file[name][:])

    attrs, shape = file.attrs, file["activations"].shape
    numbers = {name: int(attrs[name]) for name in NUMBERS}
    for name, number in numbers.items():
        require(f"attribute {name}", number >= 1 and (name != "block_bytes" or number <= LARGEST_BLOCK))
    ids, split, offsets = file["ids"][:], file["split"][:], file["offsets"][:]
    views = numbers["views"]
    known = ids.ndim == 1 and offsets.shape == (len(ids) * views + 1,)
    require("offsets", known and bool((offsets[1:] >= offsets[:-1]).all()))
    lengths = np.diff(offsets)[::views]
    labels = {name: file[f"labels/{name}"][:] for name in file.get("labels", ())}
    layout = Layout(
        fingerprint=attrs["fingerprint"].decode(),
        dtype=attrs["dtype"].decode(),
        frame_shape=shape[1:],
        lengths=lengths,
        ids=tuple(name.decode() for name in ids),
        split=split,
        labels=labels,
        labels_classes={name: classes(f"labels_classes/{name}") for name in labels},
        frame_labels_classes={name: classes(f"frame_labels_classes/{name}") for name in file.get("frame_labels", ())},
        offset=float(attrs["offset"]),
        compression=attrs["compression"].decode(),
        **numbers,
    )
    require("activations", len(shape) >= 2 and 0 not in shape[1:] and shape[0] == layout.rows)
    require("offsets", np.array_equal(layout.offsets, offsets))
    require("split", split.shape == (len(ids),) and bool((split < len(SPLITS)).all()))
    require("activations", file["activations"].chunks == _chunk_shape(layout))
    require("attribute block_bytes", layout.compression == "none" or layout.block_bytes % layout.row_bytes == 0)
    require("attribute chain_blocks", layout.compression == "none" or layout.chain_blocks == 1)
    for name, (_, table) in _tables(layout).items():
        require(name, file[name].shape == table)
    for name, codes in labels.items():
        count = len(layout.labels_classes[name])
        require(f"labels/{name}", codes.shape == (len(ids),) and bool(((codes >= 0) & (codes < count)).all()))
    return layout


def _places(file: h5py.File, layout: Layout) -> Places:
    if layout.compression == "none":
        first, size = _place(file["activations"])
    else:
        first, last = file["places"][:1].item(), file["places"][-1:].item()
        size = last - first
    checksums, scales, places = (_place(file[name])[0] for name in ("checksums", "scales", "places"))
    frame_labels = {name: _place(file[f"frame_labels/{name}"])[0] for name in layout.frame_labels_classes}
    return Places(first, size, checksums, scales, places, frame_labels)


def _place(data_set: h5py.Dataset) -> tuple[int, int]:
    place = byte_range(data_set.id)
    if place is None:
        raise ValueError(f"{data_set.name} has no place")
    return place


def _index(layout: Layout) -> dict[str, np.ndarray]:
    """Every data set that is small, by name."""
    index = {
        "offsets": layout.offsets,
        "ids": as_bytes(layout.ids),
        "split": layout.split.astype(np.uint8),
    }
    for name, codes in layout.labels.items():
        index[f"labels/{name}"] = codes.astype(np.int32)
        index[f"labels_classes/{name}"] = as_bytes(layout.labels_classes[name])
    for name, classes in layout.frame_labels_classes.items():
        index[f"frame_labels_classes/{name}"] = as_bytes(classes)
    return index


def _tables(layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of what grows with the activations, and is filled in like them."""
    return {
        "checksums": ("<u4", (layout.blocks,)),
        "scales": ("<f4", layout.scales_shape),
        "places": ("<i8", (0,) if layout.compression == "none" else (layout.blocks + 1,)),
        **{f"frame_labels/{name}": ("<i4", (int(layout.frames[-1]),)) for name in layout.frame_labels_classes},
    }


def _create_activations(file: h5py.File, layout: Layout) -> None:
    dtype = np.dtype(STORED[layout.dtype].on_disk)
    if layout.compression == "none":
        creation = _contiguous()
    else:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk(_chunk_shape(layout))
        if dtype.itemsize > 1:
            creation.set_shuffle()
        creation.set_filter(zstd.FILTER, h5py.h5z.FLAG_OPTIONAL, (zstd.LEVEL,))  # else HDF5 wants to have it, too
    _create_unfilled(file, "activations", dtype, (layout.rows, *layout.frame_shape), creation)


def _contiguous() -> h5py.h5p.PropDCID:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    return creation


def _create_unfilled(
    file: h5py.File, name: str, dtype: np.dtype, shape: tuple[int, ...], creation: h5py.h5p.PropDCID
) -> None:
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    linking = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    linking.set_create_intermediate_group(True)
    stored = h5py.h5t.py_create(dtype)
    h5py.h5d.create(file.id, name.encode(), stored, h5py.h5s.create_simple(shape), dcpl=creation, lcpl=linking)


def _chunk_shape(layout: Layout) -> tuple[int, ...] | None:
    """None where the activations are contiguous."""
    return None if layout.compression == "none" else (layout.block_bytes // layout.row_bytes, *layout.frame_shape)

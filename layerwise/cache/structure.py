"""Refuses HDF5 structures that layerwise never writes.

A file from elsewhere may hold links and storage that point into other files, filters that run code, or a size that it does
not have. HDF5 would follow all of them. So every link must be a hard one, every data set contiguous, unfiltered, of the
plain dtype that it should have, and lie within the file; all this is looked at before anything is read. Only activations
that are compressed are chunked, with the filters that layerwise writes, and HDF5 is never asked to run these.
"""

import math
from pathlib import Path

import h5py
import numpy as np

from layerwise.cache import zstd
from layerwise.cache.dtypes import STORED
from layerwise.errors import UnusableCache

NUMBERS = ("stage", "columns", "views", "hop", "block_bytes", "chain_blocks", "scale_rows")
"""The fields of a layout that are attributes, and at least 1."""

STRINGS = ("fingerprint", "dtype", "compression")

ATTRIBUTES = {
    "format_version": "<i8",
    "complete": "|u1",
    **dict.fromkeys(STRINGS, "S"),
    **dict.fromkeys(NUMBERS, "<i8"),
    "offset": "<f8",
}
DATA_SETS = {"offsets": "<i8", "ids": "S", "split": "|u1", "checksums": "<u4", "scales": "<f4", "places": "<i8"}
GROUPS = {"labels": "<i4", "labels_classes": "S", "frame_labels": "<i4", "frame_labels_classes": "S"}
"""Name to numpy dtype; S is a string of fixed length. A group's data sets all have its dtype, and its names are free."""

UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, OverflowError)
"""What h5py raises where the inside of a file makes no sense."""

_LONGEST_ATTRIBUTE = 4096
"""Bytes."""


def check_structure(path: Path, file: h5py.File, size: int) -> None:
    """Raises UnusableCache that names what is missing or odd; the file has `size` bytes."""
    for name, dtype in ATTRIBUTES.items():
        if not is_plain_attribute(file, name, dtype):
            raise unusual(path, f"attribute {name}")
    stored_as = STORED.get(file.attrs["dtype"].decode(errors="replace"))
    if stored_as is None:
        raise unusual(path, "attribute dtype")
    compression = file.attrs["compression"]
    if compression not in (b"none", b"zstd"):
        raise unusual(path, "attribute compression")
    shuffle = [h5py.h5z.FILTER_SHUFFLE] if np.dtype(stored_as.on_disk).itemsize > 1 else []
    packed = [*shuffle, zstd.FILTER] if compression == b"zstd" else None
    data_sets = DATA_SETS | {"activations": stored_as.on_disk}
    for name in (*file, *data_sets):
        if name in GROUPS:
            odd = _odd_members(file, name, size)
        else:
            filters = packed if name == "activations" else None
            odd = [] if name in data_sets and _is_stored_as(file, name, data_sets[name], size, filters) else [name]
        if odd:
            raise unusual(path, odd[0])


def is_plain_attribute(file: h5py.File, name: str, dtype: str) -> bool:
    """Whether there is such an attribute: one value of that dtype."""
    if not h5py.h5a.exists(file.id, name.encode()):
        return False
    attribute = h5py.h5a.open(file.id, name.encode())
    return (
        _is_plain_type(attribute.get_type(), dtype)
        and attribute.get_space().get_simple_extent_type() == h5py.h5s.SCALAR
        and attribute.get_type().get_size() <= _LONGEST_ATTRIBUTE
    )


def unusual(path: Path, what: str) -> UnusableCache:
    """The error for a part of a file that is not as layerwise writes it."""
    return UnusableCache(
        path, f"{path} is not a whole cache: {what} is missing or stored in a way that layerwise never writes"
    )


def byte_range(data_set: h5py.h5d.DatasetID) -> tuple[int, int] | None:
    """First byte and number of bytes of a contiguous data set, (0, 0) where it is empty; None where it has no place."""
    size = math.prod(data_set.shape) * data_set.get_type().get_size()
    if size == 0:
        return 0, 0
    start = data_set.get_offset()
    return None if start is None else (start, size)


def _odd_members(file: h5py.File, name: str, size: int) -> list[str]:
    """The group itself or those of its members that are not plain data sets."""
    if not _is_hard_link(file, name, h5py.h5o.TYPE_GROUP):
        return [name]
    group = file[name]
    return [f"{name}/{member}" for member in group if not _is_stored_as(group, member, GROUPS[name], size)]


def _is_stored_as(group: h5py.Group, name: str, dtype: str, size: int, filters: list[int] | None = None) -> bool:
    """Whether there is a data set that is contiguous and lies within the file of `size` bytes.

    filters: of one that is chunked instead. Its shape and that of its chunks are looked at when the layout is read, the
    places of these whenever one is.
    """
    if not _is_hard_link(group, name, h5py.h5o.TYPE_DATASET):
        return False
    data_set = h5py.h5d.open(group.id, name.encode())
    creation = data_set.get_create_plist()
    plain = (
        creation.get_layout() == (h5py.h5d.CONTIGUOUS if filters is None else h5py.h5d.CHUNKED)
        and not creation.get_external_count()
        and [creation.get_filter(number)[0] for number in range(creation.get_nfilters())] == (filters or [])
        and _is_plain_type(data_set.get_type(), dtype)
        and data_set.rank > 0
    )
    if not plain or filters is not None:
        return plain
    place = byte_range(data_set)
    return place is not None and sum(place) <= size


def _is_hard_link(group: h5py.Group, name: str, kind: int) -> bool:
    """Whether the name leads, without another file or name between, to an object of that kind that has no other name."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        return False
    about = h5py.h5o.get_info(group.id, name.encode())
    return about.type == kind and about.rc == 1  # many names of one data set would take memory many times over


def _is_plain_type(stored: h5py.h5t.TypeID, dtype: str) -> bool:
    if stored.committed():
        return False
    expected = np.dtype(f"S{stored.get_size()}" if dtype == "S" else dtype)
    return stored.equal(h5py.h5t.py_create(expected))

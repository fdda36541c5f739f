"""The file format of an activation cache, version 1. cache/README.md describes it for other readers.

One contiguous, unfiltered HDF5 data set `activations` [frames of all samples and views, *frame shape], frame-major, so
that a window is one contiguous read; allocated early, aligned, never filled. The file is created by h5py and closed;
rows then go in and out by pwrite and pread at the data set's offset, at the speed of the disk and without HDF5's lock.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from layerwise.errors import CacheError

FORMAT = "layerwise activation cache"
VERSION = 1
ALIGNMENT = 4096
BLOCK_BYTES = 32 * 2**20
"""Default size of what shares one checksum and one journal entry. Smaller blocks pay for more syncs; 32 MiB lost nothing."""

STORED_AS = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
"""Cache dtype to HDF5 dtype. bfloat16 has none there: its 16 bits are stored as unsigned integers."""

_ATTRIBUTES = ("complete", "fingerprint", "stage", "dtype", "columns", "views", "hop", "offset", "block_bytes")

SPLITS = ("train", "held-out", "test")
"""Meaning of the numbers in the data set `split`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything about a cache but its activations; fixed before the first row is written."""

    fingerprint: str
    """Hash of everything that made the activations."""
    stage: int
    dtype: str
    """float16, bfloat16 or float32."""
    frame_shape: tuple[int, ...]
    columns: int
    """Frames per row: 1 for sequences, patches per row for pictures."""
    views: int
    """Renderings of each sample, stored one after another."""
    lengths: np.ndarray
    """int64 [N], frames of each sample in one view."""
    ids: tuple[str, ...]
    """[N]"""
    split: np.ndarray
    """uint8 [N], an index into SPLITS."""
    labels: dict[str, np.ndarray]
    """Label name to str [N]; an empty string where a sample has none."""
    frame_labels: dict[str, np.ndarray]
    """Label name to str [frames of view 0 of all samples]."""
    hop: int
    """Distance between two frames, in frames of the network's input (samples of audio)."""
    offset: float
    """Centre of frame 0, in frames of the network's input."""
    block_bytes: int = BLOCK_BYTES
    """Bytes that share one checksum."""

    @property
    def offsets(self) -> np.ndarray:
        """int64 [N * views + 1]: rows of sample i, view v are offsets[i * views + v] to the next entry."""
        return np.concatenate([[0], np.cumsum(np.repeat(self.lengths, self.views))]).astype(np.int64)

    @property
    def rows(self) -> int:
        """Frames of all samples and views."""
        return int(self.lengths.sum()) * self.views

    @property
    def row_bytes(self) -> int:
        """Bytes of one frame."""
        return int(np.prod(self.frame_shape, dtype=np.int64)) * np.dtype(STORED_AS[self.dtype]).itemsize

    @property
    def blocks(self) -> int:
        """Number of checksummed blocks."""
        return -(-self.rows * self.row_bytes // self.block_bytes)


def create(path: Path, layout: Layout) -> None:
    """Creates the file with everything in it but the activations and their checksums, not yet marked complete.

    Of a library version whose files carry no "open for write" mark: a kill while sealing would leave that mark behind, and
    HDF5 would never open the file again.
    """
    with h5py.File(
        path, "w", libver=("earliest", "v108"), alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT
    ) as file:
        file.attrs.update(
            {
                "format": FORMAT,
                "format_version": VERSION,
                "complete": False,
                "fingerprint": layout.fingerprint,
                "stage": layout.stage,
                "dtype": layout.dtype,
                "columns": layout.columns,
                "views": layout.views,
                "hop": layout.hop,
                "offset": layout.offset,
                "block_bytes": layout.block_bytes,
            }
        )
        _store(file, "offsets", layout.offsets)
        _store(file, "ids", _as_bytes(layout.ids))
        _store(file, "split", layout.split.astype(np.uint8))
        for group, labels in (("labels", layout.labels), ("frame_labels", layout.frame_labels)):
            for name, values in labels.items():
                classes, codes = np.unique(values, return_inverse=True)
                _store(file, f"{group}/{name}", codes.astype(np.int32))
                _store(file, f"{group}_classes/{name}", _as_bytes(classes))
        _store(file, "checksums", np.zeros(layout.blocks, dtype=np.uint32))
        _create_unfilled(file, "activations", (layout.rows, *layout.frame_shape), STORED_AS[layout.dtype])


def read_layout(path: Path) -> Layout:
    """The layout of a cache file, sealed or not. Raises CacheError where it is none, or of another version."""
    with open_checked(path) as file:
        _check_structure(path, file)
        attrs = file.attrs
        offsets = file["offsets"][:]
        views = int(attrs["views"])
        return Layout(
            fingerprint=str(attrs["fingerprint"]),
            stage=int(attrs["stage"]),
            dtype=str(attrs["dtype"]),
            frame_shape=tuple(int(size) for size in file["activations"].shape[1:]),
            columns=int(attrs["columns"]),
            views=views,
            lengths=np.diff(offsets)[::views],
            ids=tuple(name.decode() for name in file["ids"][:]),
            split=file["split"][:],
            labels=_read_labels(file, "labels"),
            frame_labels=_read_labels(file, "frame_labels"),
            hop=int(attrs["hop"]),
            offset=float(attrs["offset"]),
            block_bytes=int(attrs["block_bytes"]),
        )


def open_checked(path: Path, mode: str = "r") -> h5py.File:
    """The opened HDF5 file. Raises CacheError where it is no cache of this version."""
    try:
        file = h5py.File(path, mode, locking=False)
    except FileNotFoundError:
        raise CacheError(
            f"The cache {path} is missing; start the run again to rebuild it from the stage below."
        ) from None
    except OSError as error:
        raise CacheError(
            f"{path} is not a readable HDF5 file ({error}); delete it and start the run again to rebuild it."
        ) from None
    if file.attrs.get("format") != FORMAT or file.attrs.get("format_version") != VERSION:
        found = f"{file.attrs.get('format', 'no layerwise cache')} version {file.attrs.get('format_version', '?')}"
        file.close()
        raise CacheError(f"{path} holds {found}; this layerwise reads '{FORMAT}' version {VERSION}.")
    return file


def data_offset(path: Path) -> int:
    """Byte position of the first activation in the file."""
    with open_checked(path) as file:
        offset = file["activations"].id.get_offset()
    if offset is None:
        raise CacheError(f"The activations in {path} are not contiguous; it was not written by layerwise.")
    return int(offset)


def as_stored(rows: torch.Tensor, dtype: str) -> np.ndarray:
    """CPU tensor of the cache's torch dtype to the numpy array whose bytes are stored."""
    return (rows.view(torch.uint16) if dtype == "bfloat16" else rows).numpy()


def from_stored(raw: np.ndarray, dtype: str) -> torch.Tensor:
    """The inverse of `as_stored`."""
    rows = torch.from_numpy(raw)
    return rows.view(torch.bfloat16) if dtype == "bfloat16" else rows


def reserve(path: Path, layout: Layout) -> None:
    """Claims the room of all activations, so that a full disk is met before the first row. Raises OSError."""
    size = layout.rows * layout.row_bytes
    if size:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, data_offset(path), size)
        finally:
            os.close(descriptor)


def _check_structure(path: Path, file: h5py.File) -> None:
    """Raises CacheError unless every data set is plain: h5py would follow links and storage into other files."""
    names = ["offsets", "ids", "split", "checksums", "activations"]
    for group in ("labels", "labels_classes", "frame_labels", "frame_labels_classes"):
        if isinstance(file.get(group, getlink=True), h5py.HardLink):
            names += [f"{group}/{name}" for name in file[group]]
    missing = [name for name in _ATTRIBUTES if name not in file.attrs]
    odd = missing or [name for name in names if not _is_plain(file, name)]
    if odd:
        raise CacheError(
            f"{path} is not a whole cache: {odd[0]} is missing or stored in a way that layerwise never writes."
        )


def _is_plain(file: h5py.File, name: str) -> bool:
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return False
    entry = file[name]
    return (
        isinstance(entry, h5py.Dataset)
        and entry.chunks is None
        and not entry.is_virtual
        and entry.external is None
        and entry.dtype.kind in "iufS"
    )


def _store(file: h5py.File, name: str, values: np.ndarray) -> None:
    file.create_dataset(name, data=values, track_times=False)  # the same content is the same bytes


def _create_unfilled(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, dcpl=creation)


def _as_bytes(names: tuple[str, ...] | np.ndarray) -> np.ndarray:
    return np.array([name.encode() for name in names], dtype=bytes)


def _read_labels(file: h5py.File, group: str) -> dict[str, np.ndarray]:
    labels = {}
    for name, codes in file.get(group, {}).items():
        classes = np.array([label.decode() for label in file[f"{group}_classes/{name}"][:]], dtype=str)
        labels[name] = classes[codes[:]] if len(classes) else np.zeros(0, dtype=str)
    return labels

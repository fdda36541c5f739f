"""The seal of a cache: an HDF5 user block, the first bytes of the file, which every HDF5 reader skips.

It holds the size of the file and a CRC-32 of all that the block checksums do not cover: header, index, labels, the block
checksums themselves and the padding between them. It is looked at before HDF5 sees any byte of the file.
"""

import os
import struct
from io import FileIO
from pathlib import Path

import h5py

from layerwise.cache.file_io import crc32, read_stored, write_all
from layerwise.cache.structure import UNREADABLE, is_plain_attribute
from layerwise.errors import DamagedCache, UnusableCache
from layerwise.files import open_own

NAME = "layerwise activation cache"
VERSION = 4
MAGIC = f"{NAME} {VERSION}"
USER_BLOCK = 4096
"""Bytes; HDF5 wants at least the alignment of the data sets."""

_FIELDS = struct.Struct("<32sQQQI")
_CHECK = struct.Struct("<I")
_HDF5 = b"\x89HDF\r\n\x1a\n"
_CHUNK = 2**20


def stamp(path: Path, start: int, length: int) -> None:
    """Seals a file that is otherwise whole and closed, and syncs it. Activations are `length` bytes from `start` on.

    Raises OSError.
    """
    with open_own(path) as file:
        descriptor = file.fileno()
        size, checksum = os.fstat(descriptor).st_size, _checksum_outside(path, descriptor, start, length)
        fields = _FIELDS.pack(MAGIC.encode(), size, start, length, checksum)
        fields = fields.ljust(USER_BLOCK - _CHECK.size, b"\0")
        write_all(descriptor, fields + _CHECK.pack(crc32(fields)), 0)
        os.fsync(descriptor)


def check_seal(path: Path, descriptor: int) -> tuple[int, int]:
    """First byte and number of bytes of the activations, in a file of which nothing else can be damaged.

    Raises DamagedCache where something is, UnusableCache where it is no cache of this version.
    """
    size = os.fstat(descriptor).st_size
    head = read_stored(path, descriptor, 0, min(size, USER_BLOCK)).tobytes()
    fields = head[: -_CHECK.size]
    if len(head) < USER_BLOCK or head[-_CHECK.size :] != _CHECK.pack(crc32(fields)):
        raise _unsealed(path, descriptor, head)
    magic, sealed_size, start, length, checksum = _FIELDS.unpack_from(fields)
    magic = magic.rstrip(b"\0").decode(errors="replace")
    if magic != MAGIC:
        raise of_another_version(path, magic.removeprefix(f"{NAME} "))
    if size != sealed_size:
        raise DamagedCache(path, f"it has {size} bytes instead of {sealed_size}")
    if start + length > size:
        raise DamagedCache(path, "its seal contradicts itself")
    if _checksum_outside(path, descriptor, start, length) != checksum:
        raise DamagedCache(path, "what lies around its activations does not match its checksum")
    return start, length


def of_another_version(path: Path, version: str) -> UnusableCache:
    """The error for a cache that this layerwise does not know."""
    return UnusableCache(path, f"{path} is a cache of format {version}, and this layerwise reads format {VERSION}")


def _checksum_outside(path: Path, descriptor: int, start: int, length: int) -> int:
    """Of all bytes but the seal and the activations, which are `length` from `start` on."""
    checksum = 0
    for first, last in ((USER_BLOCK, start), (max(start + length, USER_BLOCK), os.fstat(descriptor).st_size)):
        for position in range(first, last, _CHUNK):
            part = read_stored(path, descriptor, position, min(_CHUNK, last - position))
            checksum = crc32(part, checksum)
    return checksum


def _unsealed(path: Path, descriptor: int, head: bytes) -> UnusableCache:
    """Why the file has no seal."""
    if head.startswith(_HDF5):
        return _without_user_block(path, descriptor)
    has_user_block = os.pread(descriptor, len(_HDF5), USER_BLOCK) == _HDF5
    if has_user_block and not any(head):
        return DamagedCache(path, "it was never completed")
    if has_user_block or MAGIC.encode().startswith(head[: len(NAME)]):
        return DamagedCache(path, f"its first {USER_BLOCK} bytes do not match their checksum")
    return UnusableCache(path, f"{path} is no cache, nor any HDF5 file that can be read")


def _without_user_block(path: Path, descriptor: int) -> UnusableCache:
    """Version 1 had no user block, like most HDF5 files."""
    try:
        with FileIO(descriptor, closefd=False) as content, h5py.File(content, "r") as file:
            if is_plain_attribute(file, "format_version", "<i8"):
                return of_another_version(path, str(file.attrs["format_version"]))
    except UNREADABLE:
        pass
    return UnusableCache(path, f"{path} holds no layerwise cache")

"""Reads and writes at a position of a file, never short, and the checksum of what lies there.

They move no file pointer, so threads and forks may share it. The checksum is the CRC-32 of zlib and PNG, through ISA-L,
which is ten times as fast as zlib itself.
"""

import contextlib
import ctypes
import errno
import os
from pathlib import Path

import numpy as np
from isal import isal_zlib
from isal.isal_zlib import crc32 as crc32

from layerwise.errors import DamagedCache

_FETCHED = 2**20
"""Bytes that the system is asked to fetch at once: of more, Linux fetches as much as it reads ahead, often 1280 KiB."""


def _crc32_address() -> int:
    try:
        return ctypes.cast(ctypes.CDLL(isal_zlib.__file__).crc32_gzip_refl, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


CRC32_ADDRESS = _crc32_address()
"""Of the same function of ISA-L, for code in C. 0 where isal was built so that it cannot be found."""


def read_stored(path: Path, descriptor: int, position: int, size: int) -> np.ndarray:
    """uint8 [size] as they lie in the file. Raises as read_into does."""
    content = np.empty(size, dtype=np.uint8)
    read_into(path, descriptor, position, content)
    return content


def read_table(path: Path, descriptor: int, dtype: str, position: int, first: int, stop: int) -> np.ndarray:
    """Entries first to stop, [stop - first], of the table that begins at `position`. Raises as read_into does."""
    table = np.empty(stop - first, dtype)
    read_into(path, descriptor, position + first * table.itemsize, table)
    return table


def read_into(path: Path, descriptor: int, position: int, array: np.ndarray) -> None:
    """Fills it. Raises DamagedCache where the disk does not give the bytes back, or the file ends before."""
    filled = 0
    while filled < array.nbytes:
        # Nearly always it is filled at once, and a view of bytes would cost as much as two of the other steps.
        missing = memoryview(array).cast("B")[filled:] if filled else array
        try:
            count = os.preadv(descriptor, [missing], position + filled)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedCache(path, f"the disk does not give it back ({error.strerror})") from None
        if count == 0:
            raise DamagedCache(path, "it ends early")
        filled += count


def in_memory(descriptor: int, position: int) -> bool:
    """Whether that byte could be read without waiting for the disk. No where this system cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT) == 1
    except (OSError, NotImplementedError, AttributeError):  # a Python built for an older system has no RWF_NOWAIT
        return False


def fetch(descriptor: int, position: int, size: int) -> None:
    """Has the system bring bytes into memory, if it wants to; returns before it has."""
    with contextlib.suppress(OSError):
        for start in range(0, size, _FETCHED):
            length = min(_FETCHED, size - start)  # never 0, which would be the whole file
            os.posix_fadvise(descriptor, position + start, length, os.POSIX_FADV_WILLNEED)


def write_all(descriptor: int, content: memoryview | bytes, position: int) -> None:
    """Raises OSError where the disk does not take it."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written

"""Reads and writes at a position of a file, never short. They move no file pointer, so threads and forks may share it."""

import contextlib
import errno
import os
from pathlib import Path

import numpy as np

from layerwise.errors import DamagedCache

_FETCHED = 2**20
"""Bytes that the system is asked to fetch at once: of more, Linux fetches as much as it reads ahead, often 1280 KiB."""


def read_stored(path: Path, descriptor: int, position: int, size: int) -> np.ndarray:
    """uint8 [size] as they lie in the file. Raises as read_into does."""
    content = np.empty(size, dtype=np.uint8)
    read_into(path, descriptor, position, content)
    return content


def read_into(path: Path, descriptor: int, position: int, array: np.ndarray) -> None:
    """Fills it. Raises DamagedCache where the disk does not give the bytes back, or the file ends before."""
    filled = 0
    while filled < array.nbytes:
        # Nearly always it is filled at once, and a view of bytes would cost as much as two of the other steps.
        missing = memoryview(array).cast("B")[filled:] if filled else array
        try:
            count = os.preadv(descriptor, [missing], position + filled)
        except OSError as error:
            raise _unread(path, error) from None
        if count == 0:
            raise DamagedCache(path, "it ends early")
        filled += count


def read_few(path: Path, descriptor: int, position: int, size: int) -> bytes:
    """What read_stored gives, of a few bytes, in a third of the time."""
    try:
        content = os.pread(descriptor, size, position)
    except OSError as error:
        raise _unread(path, error) from None
    # Network file systems may give fewer at once, though the file goes on.
    return content if len(content) == size else read_stored(path, descriptor, position, size).tobytes()


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


def _unread(path: Path, error: OSError) -> OSError | DamagedCache:
    if error.errno != errno.EIO:
        return error
    return DamagedCache(path, f"the disk does not give it back ({error.strerror})")

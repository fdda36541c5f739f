"""Reads and writes at a position of a file, never short. They move no file pointer, so threads and forks may share it."""

import errno
import os
from pathlib import Path

import numpy as np

from layerwise.errors import DamagedCache


def read_stored(path: Path, descriptor: int, position: int, size: int) -> np.ndarray:
    """uint8 [size] as they lie in the file. Raises DamagedCache where the disk does not give them back, or has fewer."""
    content = np.empty(size, dtype=np.uint8)
    read_into(path, descriptor, position, memoryview(content))
    return content


def read_into(path: Path, descriptor: int, position: int, missing: memoryview) -> None:
    """Fills the memory. Raises as read_stored does."""
    while missing:
        try:
            count = os.preadv(descriptor, [missing], position)
        except OSError as error:
            raise _unread(path, error) from None
        if count == 0:
            raise DamagedCache(path, "it ends early")
        missing, position = missing[count:], position + count


def read_from_memory(descriptor: int, position: int, wanted: np.ndarray) -> int:
    """How many of the bytes it could read without waiting for the disk; 0 where the file system cannot tell."""
    try:
        return os.preadv(descriptor, [wanted], position, os.RWF_NOWAIT)
    except OSError:  # a read that may wait says what is wrong, if anything is
        return 0


def read_few(path: Path, descriptor: int, position: int, size: int) -> bytes:
    """The same for a few bytes, in a third of the time."""
    try:
        content = os.pread(descriptor, size, position)
    except OSError as error:
        raise _unread(path, error) from None
    # Network file systems may give fewer at once, though the file goes on.
    return content if len(content) == size else read_stored(path, descriptor, position, size).tobytes()


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

"""Files that survive a crash: written whole or not at all, and locked while a run uses their folder."""

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError, RunError

GLANCE_SECONDS = 0.5
"""How long a lock may be held by somebody who only looks whether it is held, see `is_locked`."""


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Replaces the file by the content, part after part: after a crash it holds either the old bytes or the new ones.

    Raises RunError where the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(unwritable(path, error)) from None


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one in each line; a line that a kill has torn is left out.

    Gives an empty list where there is no such file.
    """
    found = []
    for line in read_bytes(path).splitlines() if path.exists() else ():
        with suppress(ValueError):
            entry = json.loads(line)
            found += [entry] if isinstance(entry, dict) else []
    return found


MOST_BYTES = 2**28
"""Of a file that is read whole into memory."""


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A regular file. Raises RunError where it is missing, something else (which may never end), or of more bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would be waited for
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise RunError(f"{path} is not a regular file; move it away.")
            if found.st_size > most:
                raise RunError(f"{path} has {found.st_size:,} bytes, and at most {most:,} are read; move it away.")
            return file.read()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from None


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_unwritable(folder: Path) -> None:
    """Raises RunError where the folder can neither be written nor made; nothing is changed on the disk to find out."""
    here = folder.absolute()
    nearest = next(place for place in (here, *here.parents) if place.exists())
    if not nearest.is_dir():
        raise RunError(f"{folder} cannot be written: {nearest} is not a folder; name another one.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"{folder} cannot be written: {nearest} does not let you; name another one.")


def unwritable(path: Path, error: OSError) -> str:
    """The sentence for an error of the operating system on a file that is written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No room is left on the disk for {path}; free some and start the same command again, nothing is lost."
    return f"{path} cannot be written: {error.strerror or error}."


@contextmanager
def exclusive(
    path: Path, busy: LayerwiseError, wait_seconds: float = GLANCE_SECONDS, poll: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Holds the lock file; the lock ends with the process.

    Raises `busy` where another process holds it for longer than `wait_seconds`, RunError where the file cannot be locked.
    poll: is called before each try, and may raise.
    """
    deadline = time.monotonic() + wait_seconds
    poll()
    while (descriptor := _try_to_lock(path)) is None:
        if time.monotonic() > deadline:
            raise busy
        time.sleep(0.02)
        poll()
    try:
        yield
    finally:
        os.close(descriptor)


def _try_to_lock(path: Path) -> int | None:
    """A file descriptor that holds the lock; None where another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(unwritable(path, error)) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise RunError(f"{path} cannot be locked: {error.strerror}; use a file system that has locks.") from None


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False

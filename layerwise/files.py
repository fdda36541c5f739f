"""Files that survive a crash: written whole or not at all, by one process at a time, and never through a link.

A folder may come from somebody else. A link, a pipe or a device that lies there under the name of a file of ours is not
followed, waited for or written to.
"""

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from layerwise.errors import LayerwiseError, RunError, UnreadableFile

OURS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags of os.open for a file that is written: no link is followed, no pipe is waited for."""

RECORD_BYTES = 64 * 2**20
"""Most that a file of text is read of: none that layerwise writes comes near it."""

LOG_BYTES = 2**30
"""The same of a file that grows by a line a second."""

GLANCE_SECONDS = 0.5
"""How long a lock may be held by somebody who only looks whether it is held, see `is_locked`."""


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Replaces the file by the content, part after part: after a crash it holds either the old bytes or the new ones.

    Raises RunError where the folder cannot be written, the disk is full, or another process is writing the file.
    """
    replace_atomically(path, lambda file: file.writelines(content))


def replace_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """The same for content that is written piece by piece: `write` is given the new file."""
    temporary = path.with_name(path.name + ".tmp")
    busy = RunError(f"Another process is writing {path}; wait for it, and start the same command again.")
    with errors_of_writing(path, RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_new(temporary, busy) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)


def open_new(path: Path, busy: LayerwiseError, leftovers: Iterable[Path] = ()) -> BinaryIO:
    """A new file, to write and to read; until it is closed, no other process makes one of that name.

    What a kill has left at the path is deleted, behind `leftovers`, which are made while it is there. On a file system
    without locks nobody is kept away. Raises `busy` where another process is at it, OSError where the file cannot be made.
    """
    try:
        return _open_locked(path, busy, leftovers)
    except _NoLocks:
        path.unlink(missing_ok=True)
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | OURS, 0o666), "w+b")


def _open_locked(path: Path, busy: LayerwiseError, leftovers: Iterable[Path]) -> BinaryIO:
    left = _lock_leftover(path, busy)
    try:
        if left is not None:
            for each in leftovers:
                each.unlink(missing_ok=True)
            path.unlink()
        try:
            made = _lock(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            made = None
    finally:
        if left is not None:
            os.close(left)
    if made is None:
        raise busy
    return os.fdopen(made, "w+b")


def _lock_leftover(path: Path, busy: LayerwiseError) -> int | None:
    """A file descriptor that holds the lock of what a kill has left; None where nothing is left by now."""
    try:
        left = _lock(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        path.unlink(missing_ok=True)  # a link
        return None
    if left is None:
        raise busy
    return left


def open_own(path: Path) -> BinaryIO:
    """A file that is there, to read and to write. Raises OSError where there is none, or it is no plain file of its own."""
    file = os.fdopen(os.open(path, os.O_RDWR | OURS), "r+b")
    about = os.fstat(file.fileno())
    if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
        return file
    file.close()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def open_to_append(path: Path) -> BinaryIO:
    """A file that is read, cut and written at its end, made where there is none. Raises OSError where it is no plain file.

    What shares its content with another name gets a copy first, which that name does not change with.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | OURS, 0o666), "r+b", buffering=0)
    about = os.fstat(file.fileno())
    if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
        return file
    with file:
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        write_atomically(path, file.read())
    return open_to_append(path)


def read_bytes(path: Path, most: int = RECORD_BYTES) -> bytes:
    """The whole file. Raises FileNotFoundError where there is none, UnreadableFile as `check_readable` does."""
    with open_readable(path, most) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise UnreadableFile(f"{path} cannot be read: {error.strerror}.") from None
    if len(content) > most:  # it grows
        raise _too_large(path, most)
    return content


def read_text(path: Path) -> str:
    """The same of a file of text in UTF-8; raises UnreadableFile where it is none, too."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError:
        raise UnreadableFile(f"{path} is no text in UTF-8; restore it, or delete it.") from None


def check_readable(path: Path, most: int | None = None) -> None:
    """To be called before a library opens the file.

    Raises FileNotFoundError where there is none, UnreadableFile where it is a folder, a pipe or a device, has more than
    `most` bytes, or may not be read.
    """
    open_readable(path, most).close()


def open_readable(path: Path, most: int | None = None) -> BinaryIO:
    """The file, to read. Raises as `check_readable` does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UnreadableFile(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from None
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and (most is None or about.st_size <= most):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(about.st_mode):
        raise _too_large(path, most or 0)
    reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(about.st_mode) else "it is a pipe or a device"
    raise UnreadableFile(f"{path} cannot be read: {reason}; move it away.")


def _too_large(path: Path, most: int) -> UnreadableFile:
    return UnreadableFile(
        f"{path} has more than the {most:,} bytes that such a file may have; restore it, or delete it."
    )


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one in each line; a line that a kill has torn is left out.

    Gives an empty list where there is no such file. Raises UnreadableFile.
    """
    try:
        lines = read_bytes(path, LOG_BYTES).splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            found += [entry] if isinstance(entry, dict) else []
    return found


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


@contextmanager
def errors_of_writing(path: Path, raises: type[LayerwiseError]) -> Iterator[None]:
    """Turns what the system refuses, while the file is written, into an error of this type that says so."""
    try:
        yield
    except OSError as error:
        raise raises(unwritable(path, error)) from None


def unwritable(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No room is left on the disk for {path}; free some and start the same command again, nothing is lost."
    if error.errno == errno.EFBIG:
        return f"{path} cannot be written: {error.strerror}; raise that limit (ulimit -f) and start the same command again."
    if error.errno == errno.ELOOP:
        return f"{path} cannot be written: what lies there is a link, or no plain file; delete it."
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
    with errors_of_writing(path, RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, os.O_RDWR | os.O_CREAT)
        if descriptor is None or os.fstat(descriptor).st_nlink == 1:
            return descriptor
        # A copy by `cp -al` has the same file as its lock. The lock is held, so nobody is at work behind either name.
        with open_new(path.with_name(f"{path.name}.tmp"), RunError(f"{path} is being replaced; try again.")) as fresh:
            own = os.dup(fresh.fileno())
        os.replace(path.with_name(f"{path.name}.tmp"), path)
        os.close(descriptor)
        return own


def _lock(path: Path, flags: int) -> int | None:
    """A file descriptor that holds the lock of the file at the path; None where another process holds it, or has replaced it.

    Raises OSError where it cannot be opened, _NoLocks.
    """
    descriptor = os.open(path, flags | OURS, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(descriptor)
        raise _NoLocks(f"{path} cannot be locked: {error.strerror}; use a file system that has locks.") from None
    os.close(descriptor)
    return None


class _NoLocks(RunError):
    """The file system has none."""


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | OURS)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False

"""The screen is not the work: a standard stream that fails is given up, and text is changed so that it can be shown."""

import errno
import fcntl
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO

from layerwise.errors import OutputLost, ReaderGone

_NOT_TO_BE_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines, changes of the direction of writing, and bytes of file names that are no text."""


LONGEST_SENTENCE = 1000
"""Letters."""


def printable(text: str) -> str:
    """The text in one line, for a terminal or a log: what a terminal would obey stands there as in Python, \\n or \\x1b."""
    return _NOT_TO_BE_SHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def abridged(text: str) -> str:
    """The text without its middle where it is longer than a sentence can be: it repeats a value of a foreign file, say."""
    if len(text) <= LONGEST_SENTENCE:
        return text
    half = LONGEST_SENTENCE // 2
    return f"{text[:half]} [{len(text) - LONGEST_SENTENCE} letters left out] {text[-half:]}"


class Screen(io.TextIOBase):
    """A text stream whose writes never fail: what its encoding lacks is written as \\xe9, and after an error nothing more.

    lost: the error with which the stream was given up; a stream that was closed from the start (None) is given up already.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self.lost: OSError | None = None if stream else _error(errno.EBADF)

    def __getattr__(self, name: str) -> Any:  # what a TextIOBase has not: buffer, name, reconfigure
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and not self.lost and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno() if self._stream is not None else super().fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._attempt(lambda stream: stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, work: Callable[[IO[str]], object]) -> None:
        """Gives the stream up where the work fails; its error itself would hold on to the tensors of its callers."""
        if self._stream is not None and not self.lost:
            try:
                work(self._stream)
            except OSError as error:
                self.lost = _error(error.errno or errno.EIO)
            except ValueError:  # Python's word for a file that is closed
                self.lost = _error(errno.EBADF)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@contextmanager
def standard_streams_may_fail() -> Iterator[Screen]:
    """sys.stdout and sys.stderr are Screens meanwhile; gives the first. For a whole process: what was lost stays lost."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened, a cache say, would take what libraries print
            os.open(os.devnull, os.O_RDWR)
    before, apart = (sys.stdout, sys.stderr), _apart_from_libraries(sys.stderr)
    out, err = Screen(sys.stdout), Screen(apart)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        for screen in (out, err):
            screen.flush()
            if screen.lost:
                _forget_what_is_left(screen)
        if apart is not None and apart is not before[1]:
            with suppress(OSError):
                apart.close()


def _apart_from_libraries(stream: TextIO | None) -> TextIO | None:
    """The same by another descriptor, where it has that to which C code prints: a bar keeps its terminal, see `quiet`."""
    try:
        if stream is None or stream.fileno() != STANDARD_ERROR:
            return stream
        stream.flush()
        return open(os.dup(STANDARD_ERROR), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
    except (OSError, ValueError):
        return stream


STANDARD_ERROR = 2

_OF_DECODERS = re.compile(
    rb"^(?:\[[^\]\n]*libmpg123[^\]\n]*\] |Note: |Warning: (?:Xing|Big change))[^\n]*\n?", re.MULTILINE
)


class _Overheard:
    """The standard error output while decoders are at work: all but their own lines is passed on, whoever has printed it."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def begin(self) -> None:
        """May be called by several threads; raises OSError."""
        with self._lock:
            if not self._inside:
                kept, heard = os.dup(STANDARD_ERROR), os.memfd_create("heard")
                fcntl.fcntl(heard, fcntl.F_SETFL, os.O_APPEND)
                os.dup2(heard, STANDARD_ERROR)
                self._kept, self._heard, self._passed_on = kept, heard, 0
            self._inside += 1

    def end(self) -> None:
        """Once for each `begin`."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                os.dup2(self._kept, STANDARD_ERROR)
            content = os.pread(self._heard, os.fstat(self._heard).st_size - self._passed_on, self._passed_on)
            self._passed_on += len(content)
            if others := _OF_DECODERS.sub(b"", content):
                with suppress(OSError):
                    os.write(self._kept, others)
            if not self._inside:
                os.close(self._heard)
                os.close(self._kept)


_overheard = _Overheard()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the comments of the decoder of MP3 off the screen: it prints one whenever a file is read from its middle."""
    try:
        _overheard.begin()
    except OSError:  # the standard error output is closed
        yield
        return
    try:
        yield
    finally:
        _overheard.end()


def _forget_what_is_left(screen: Screen) -> None:
    """Python writes what is left in a stream when the process ends, and fails with code 120 where it cannot."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, screen.fileno())
        os.close(nowhere)


def refuse_loss(stream: IO[str] | None) -> None:
    """Raises OutputLost or ReaderGone where the stream was given up: for whoever has nothing to give but what it prints."""
    lost = stream.lost if isinstance(stream, Screen) else None
    if lost is None:
        return
    if lost.errno == errno.EPIPE:
        raise ReaderGone("Whoever read the output has gone.")
    raise OutputLost(f"The output cannot be written: {lost.strerror}.")

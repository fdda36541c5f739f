"""The screen is not the work: a standard stream that fails is given up, and text is changed so that it can be shown."""

import errno
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
    """The same by another descriptor, where it has that to which C code prints: see `quiet`."""
    try:
        if stream is None or stream.fileno() != STANDARD_ERROR:
            return stream
        stream.flush()
        return open(os.dup(STANDARD_ERROR), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
    except (OSError, ValueError):
        return stream


STANDARD_ERROR = 2
_lock = threading.Lock()
_silencing: list[int] = []
"""The descriptor under which the standard error output is kept meanwhile, once for each thread that wants it quiet."""


@contextmanager
def quiet() -> Iterator[None]:
    """What C code prints to the standard error output meanwhile is lost; not where Python itself prints to that descriptor."""
    try:
        mixed = sys.stderr is not None and sys.stderr.fileno() == STANDARD_ERROR
    except (OSError, ValueError, AttributeError):  # of a notebook, say: none
        mixed = False
    if mixed:
        yield
        return
    with _lock:
        kept = _silencing[0] if _silencing else os.dup(STANDARD_ERROR)
        if not _silencing:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, STANDARD_ERROR)
            os.close(nowhere)
        _silencing.append(kept)
    try:
        yield
    finally:
        with _lock:
            _silencing.pop()
            if not _silencing:
                os.dup2(kept, STANDARD_ERROR)
                os.close(kept)


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

"""HDF5 files that are written on a disk that may fill up: where a write fails while HDF5 closes a file, it ends the process.

So HDF5 writes through Python, and is told that every write went well; what befell the first one that did not is raised
instead, by whoever looks, and at the end.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import h5py


class Target(io.FileIO):
    """The file behind a descriptor, as h5py takes it; the descriptor stays open."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "r+", closefd=False)
        self._error: BaseException | None = None

    def raise_if_failed(self) -> None:
        """Raises OSError, or what else has come between, where anything that was written is not in the file."""
        if self._error is not None:
            raise self._error

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        with self._kept():
            while view:
                view = view[super().write(view) :]
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        with self._kept():
            super().truncate(size)
        return size or 0

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Keeps what is raised within, and goes on; a signal may raise anything."""
        try:
            yield
        except BaseException as error:
            self._error = self._error or error


@contextlib.contextmanager
def writable(descriptor: int, mode: str, **options: Any) -> Iterator[tuple[h5py.File, Target]]:
    """An HDF5 file open for writing, options as h5py.File has them. Raises OSError where the disk did not take all of it."""
    target = Target(descriptor)
    try:
        with h5py.File(target, mode, **options) as file:
            yield file, target
    finally:
        target.raise_if_failed()  # whatever HDF5 made of it

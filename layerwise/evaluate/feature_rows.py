"""The features of a probe on the disk, so that the host memory it takes does not grow with the data."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from layerwise.errors import RunError
from layerwise.files import unwritable


class FeatureRows:
    """float32 rows [N, C] in a file without a name, which goes with it."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError where the folder does not take it."""
        self.channels = self.rows = 0
        self._folder = folder
        with self._sentences():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - it is open for as long as this object lives

    def append(self, rows: np.ndarray) -> None:
        """More rows float32 [n, C]. Raises RunError where the disk is full."""
        self.channels = rows.shape[1]
        with self._sentences():
            self._file.write(np.ascontiguousarray(rows, dtype=np.float32).tobytes())
        self.rows += len(rows)

    def read(self, first: int, stop: int) -> np.ndarray:
        """float32 [stop - first, C]"""
        with self._sentences():
            self._file.flush()
            content = os.pread(self._file.fileno(), (stop - first) * self._row_bytes, first * self._row_bytes)
        return np.frombuffer(content, dtype=np.float32).reshape(stop - first, self.channels)

    def close(self) -> None:
        """Frees its room on the disk."""
        self._file.close()

    @property
    def bytes(self) -> int:
        return self.rows * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return 4 * self.channels

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(unwritable(self._folder / "features", error)) from None

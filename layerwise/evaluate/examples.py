"""The rows that a classifier is fitted to and tested on: standardised features and their classes, piece by piece.

The features lie in a file on the disk, so that the host memory of a probe does not grow with the data.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

from layerwise.errors import RunError
from layerwise.files import errors_of_writing


class FeatureRows:
    """float32 rows [N, C] in a file without a name, which goes with it."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError where the folder does not take it."""
        self.channels = self.rows = 0
        self._folder = folder
        with errors_of_writing(folder / "features", RunError):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - it is open for as long as this object lives

    def append(self, rows: np.ndarray) -> None:
        """More rows float32 [n, C]. Raises RunError where the disk is full."""
        self.channels = rows.shape[1]
        with errors_of_writing(self._folder / "features", RunError):
            self._file.write(np.ascontiguousarray(rows, dtype=np.float32).tobytes())
        self.rows += len(rows)

    def read(self, rows: range) -> np.ndarray:
        """float32 [rows, C]"""
        with errors_of_writing(self._folder / "features", RunError):
            self._file.flush()
            row_bytes = 4 * self.channels
            content = os.pread(self._file.fileno(), len(rows) * row_bytes, rows.start * row_bytes)
        return np.frombuffer(content, dtype=np.float32).reshape(len(rows), self.channels)

    def close(self) -> None:
        """Frees its room on the disk."""
        self._file.close()


Poll = Callable[[], None]
"""Is called between two pieces and may raise."""

PIECE_BYTES = 64 * 2**20
"""Features in memory at once; fewer are kept there."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the rows of each split lie: training rows first, then held-out ones, then those of the test."""

    train: range
    held_out: range
    test: range

    @classmethod
    def of(cls, train: int, held_out: int, test: int) -> "Parts":
        """Parts of so many rows each."""
        fitted = train + held_out
        return cls(range(train), range(train, fitted), range(fitted, fitted + test))

    @property
    def fitted(self) -> range:
        """Training and held-out rows."""
        return range(self.held_out.stop)


class Examples:
    """Rows in their order; each channel has mean 0 and spread 1 over the training rows."""

    def __init__(self, features: FeatureRows, classes: np.ndarray, parts: Parts, poll: Poll = lambda: None) -> None:
        """classes: int64 [N] from 0."""
        self.parts, self.channels = parts, features.channels
        self.count = int(classes.max()) + 1
        self._features, self._classes, self._poll = features, classes, poll
        self._step = max(PIECE_BYTES // (4 * features.channels), 1)
        self._mean, self._spread = self._statistics()
        self._kept = self._read(range(features.rows)) if features.rows <= self._step else None

    def pieces(self, rows: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """float32 [n, C] and int64 [n] of these rows, piece after piece."""
        for piece in self._pieces(rows):
            x = self._read(piece) if self._kept is None else self._kept[piece.start : piece.stop]
            yield x, torch.from_numpy(self.classes(piece))

    def classes(self, rows: range) -> np.ndarray:
        """int64 [n]"""
        return self._classes[rows.start : rows.stop]

    def _pieces(self, rows: range) -> Iterator[range]:
        for first in range(rows.start, rows.stop, self._step):
            self._poll()
            yield range(first, min(first + self._step, rows.stop))

    def _read(self, rows: range) -> torch.Tensor:
        centred = self._features.read(rows) - self._mean
        # A channel that never varies carries nothing; dividing by its spread would turn rounding into a feature.
        varies = self._spread > 1e-6 * (np.abs(self._mean) + self._spread.max())
        return torch.from_numpy(np.where(varies, centred / np.maximum(self._spread, 1e-12), 0).astype(np.float32))

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and spread float32 [C] of the training rows."""
        train, read = self.parts.train, self._features.read
        mean = sum(read(piece).sum(0, dtype=np.float64) for piece in self._pieces(train)) / len(train)
        squares = sum(np.square(read(piece) - mean).sum(0, dtype=np.float64) for piece in self._pieces(train))
        return mean.astype(np.float32), np.sqrt(squares / len(train)).astype(np.float32)

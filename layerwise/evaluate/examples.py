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
        """float32 [rows, C], the caller's own."""
        into = np.empty((len(rows), self.channels), dtype=np.float32)
        with errors_of_writing(self._folder / "features", RunError):
            self._file.flush()
            os.preadv(self._file.fileno(), [into], rows.start * into.strides[0])
        return into

    def close(self) -> None:
        """Frees its room on the disk."""
        self._file.close()


Poll = Callable[[], None]
"""Is called between two pieces and may raise."""

PIECE_BYTES = 64 * 2**20
"""Features that are read at once."""

KEPT_BYTES = 4 * PIECE_BYTES
"""Features up to which all of them stay in memory."""


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


QUARTERS = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of the first `count`: of every four the one at `quarter`, or the three others."""

    count: int
    quarter: int
    others: bool

    def __len__(self) -> int:
        one = len(range(self.quarter, self.count, QUARTERS))
        return self.count - one if self.others else one

    def among(self, numbers: range) -> torch.Tensor:
        """bool [n]: which of these rows they are."""
        return (torch.arange(numbers.start, numbers.stop) % QUARTERS == self.quarter) != self.others


class Examples:
    """Rows in their order; each channel has mean 0 and spread 1 over the training rows."""

    def __init__(self, features: FeatureRows, classes: np.ndarray, parts: Parts, poll: Poll = lambda: None) -> None:
        """classes: int64 [N] from 0."""
        self.parts, self.channels = parts, features.channels
        self.count = int(classes.max()) + 1
        self._features, self._classes, self._poll = features, torch.from_numpy(classes), poll
        # Scores of a piece are in memory, too.
        self._step = max(PIECE_BYTES // (4 * max(features.channels, self.count)), 1)
        self._kept: torch.Tensor | None = None
        self._mean, self._scale = torch.zeros(features.channels), torch.ones(features.channels)
        self._mean, self._scale = self._statistics()
        if 4 * features.channels * features.rows <= KEPT_BYTES:
            self._kept = self._read(range(features.rows))

    def pieces(self, rows: range | Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """float32 [n, C] and int64 [n] of these rows, piece after piece."""
        whole = rows if isinstance(rows, range) else range(rows.count)
        for first in range(whole.start, whole.stop, self._step):
            self._poll()
            piece = range(first, min(first + self._step, whole.stop))
            x = self._read(piece) if self._kept is None else self._kept[piece.start : piece.stop]
            y = self._classes[piece.start : piece.stop]
            chosen = ... if isinstance(rows, range) else rows.among(piece)
            yield x[chosen], y[chosen]

    def classes(self, rows: range) -> np.ndarray:
        """int64 [n]"""
        return self._classes[rows.start : rows.stop].numpy()

    def _read(self, rows: range) -> torch.Tensor:
        return torch.from_numpy(self._features.read(rows)).sub_(self._mean).mul_(self._scale)

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [C]: mean of the training rows, and what brings their spread to 1."""
        train = self.parts.train
        mean, squares = torch.zeros(2, self.channels, dtype=torch.float64)
        for x, _ in self.pieces(train):
            mean += x.sum(0, dtype=torch.float64) / len(train)
        for x, _ in self.pieces(train):
            squares += x.sub_(mean).square_().sum(0, dtype=torch.float64) / len(train)
        spread = squares.sqrt()
        # A channel that never varies carries nothing; dividing by its spread would turn rounding into a feature.
        varies = spread > 1e-6 * (mean.abs() + spread.max())
        return mean.float(), torch.where(varies, 1 / spread, 0).float()

"""Steps in frames of several: neighbouring ones side by side, for a network that reads a stretch of them at once."""

import hashlib
from typing import Any

import numpy as np
import torch

from layerwise.data.source import DataSet


class Framed:
    """A data set of steps in frames of `length` steps, one every `step` steps.

    Steps of shape (C, *rest) make frames of shape (C, length, *rest).
    """

    def __init__(self, data: DataSet, length: int, step: int) -> None:
        self._data, self._length, self._step = data, length, step
        self.lengths = np.maximum((data.lengths - length) // step + 1, 0)
        self.frame_shape = (data.frame_shape[0], length, *data.frame_shape[1:])
        self.identity = hashlib.sha256(f"{data.identity} in frames of {length} every {step}".encode()).hexdigest()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        return getattr(self._data, name)

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample."""
        if start == stop:
            return torch.empty(0, *self.frame_shape)
        steps = self._data.read(sample, start * self._step, (stop - 1) * self._step + self._length, view)
        return in_frames(steps[None], self._length, self._step)[0]

    def frame_labels(self, name: str, sample: int, positions: np.ndarray) -> np.ndarray:
        """Those of the step in the middle of each frame."""
        return self._data.frame_labels(name, sample, positions * self._step + (self._length - 1) / 2)


def in_frames(steps: torch.Tensor, length: int, step: int) -> torch.Tensor:
    """Steps (B, L, C, *rest) to frames (B, L', C, length, *rest)."""
    return steps.unfold(1, length, step).movedim(-1, 3)

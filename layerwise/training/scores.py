"""Scores of steps, which stay on the device until several of them are read at once: for each read the host waits."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from layerwise.memory.meter import uncounted
from layerwise.memory.microbatch import Total

K = TypeVar("K")

READ_AT_ONCE = 16
"""Steps of a GPU."""


@dataclass(slots=True)
class UnreadScores(Generic[K]):
    """Scores on the device, each with what it belongs to."""

    device: torch.device
    _waiting: list[tuple[K, Total]] = field(default_factory=list)

    def add(self, of: K, score: Total) -> None:
        """One more."""
        self._waiting.append((of, score))

    @property
    def due(self) -> bool:
        """Whether it is time to read: on a CPU, where nobody waits, after each step."""
        return len(self._waiting) >= (READ_AT_ONCE if self.device.type == "cuda" else 1)

    def read(self) -> list[tuple[K, float, float]]:
        """What each belongs to, its loss and its accuracy, in order; they are let go of."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        with uncounted():
            values = torch.stack([value for _, score in waiting for value in (score.loss, score.accuracy)]).tolist()
        return [(of, *pair) for (of, _), pair in zip(waiting, zip(values[::2], values[1::2], strict=True), strict=True)]

"""What a local objective is: it draws what it needs on the host, then scores on the device."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Score:
    """The value of an objective on a batch; both are scalars on the device."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    """Part of the predictions in which the positive scores above every negative, without gradient."""


class Objective(Protocol):
    """An `nn.Module` whose parameters are trained with the stage's and thrown away after it."""

    def draw(self, lengths: np.ndarray, frames: int, columns: int, rng: np.random.Generator) -> Any:
        """Everything random about one batch.

        lengths: int64 [B], real frames of each sample; frames: L of the padded batch; columns: frames per row.
        """
        ...

    def __call__(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Any) -> Score:
        """targets (B, L, C), contexts (B, L, D), padded to the L of the draw."""
        ...

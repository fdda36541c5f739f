"""What a local objective is: it draws what it needs on the host, then scores on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Score:
    """The value of an objective on a batch, or on a part of it; both are scalars on the device."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    """Part of the predictions that are right, without gradient: the target scores above every negative, or the class is
    the sample's."""


class Draw(Protocol):
    """Everything random about one pass over a batch."""

    @property
    def rows(self) -> np.ndarray:
        """int64 [R], sorted, each once: the frames that are scored, numbered b * L + t over the padded batch."""
        ...


class Objective(Protocol):
    """An `nn.Module` whose parameters are trained with the stage's and thrown away after it."""

    def draw(
        self,
        lengths: np.ndarray,
        frames: int,
        columns: int,
        rng: np.random.Generator,
        passes: int = 1,
        classes: np.ndarray | None = None,
    ) -> Sequence[Draw]:
        """Everything random about one batch, as one draw per pass: the losses of the passes add up to the batch's.

        lengths: int64 [B], real frames of each sample; frames: L of the padded batch; columns: frames per row;
        passes: at most B. More passes hold fewer rows at once; what is drawn does not depend on them. classes: int64 [B],
        -1 where a sample has no label; None where the run names no label.
        """
        ...

    def __call__(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Any, room: int) -> Score:
        """targets (R, C) and contexts (R, D) at the rows of the draw; the same tensor where they are the same.

        room: bytes that the work may take on the device beside these, their gradients and the objective's own.
        """
        ...


class ObjectiveModule(nn.Module, Objective):
    """What an Objective is besides, which a Protocol cannot say; nobody needs to derive from it."""

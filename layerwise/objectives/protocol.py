"""What a local objective is: it draws what it needs on the host, then scores on the device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast, runtime_checkable

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
    """Everything random about a part of a batch."""

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
        parts: int = 1,
        classes: np.ndarray | None = None,
    ) -> Sequence[Draw]:
        """Everything random about one batch, as one draw per part of it: the losses of the parts add up to the batch's.

        lengths: int64 [B], real frames of each sample; frames: L of the padded batch; columns: frames per row;
        parts: at most B. More parts hold fewer rows at once; what is drawn does not depend on them. classes: int64 [B],
        -1 where a sample has no label; None where the run names no label.
        """
        ...

    def __call__(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Any, room: int) -> Score:
        """targets (R, C) and contexts (R, D) at the rows of the draw; the same tensor where they are the same.

        room: bytes that the work may take on the device beside these, their gradients and the objective's own.
        """
        ...


class Arrays:
    """Base of a draw, a dataclass, whose numpy arrays may be tensors of the device as well when it is scored.

    All of them then come to the device together. Of a draw that does not derive from this, the objective brings them itself.
    """

    __slots__ = ()

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """By the names of their fields."""
        values = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


Group = tuple[slice, torch.Tensor, torch.Tensor | None]
"""Some rows of a parameter: which, their values on the device, and their gradient, which is added to where it is wanted."""


@runtime_checkable
class Streamed(Protocol):
    """An objective with a parameter that need not be on the device all at once."""

    @property
    def stacked(self) -> nn.Parameter:
        """(K, ...), of which some rows at a time are enough."""
        ...

    def targets_at_once(self, room: int, at_once: int) -> int:
        """Targets that are scored in so many bytes, where at_once rows of the stacked parameter are there: few take longer."""
        ...

    def streamed(
        self, targets: torch.Tensor, contexts: torch.Tensor, draw: Any, room: int, groups: Iterable[Group]
    ) -> Score:
        """The part of the score that comes from these groups of the stacked parameter; all groups make what a call gives.

        The gradients of the groups are made along with the score. A group is let go of before the next is asked for.
        """
        ...


class ObjectiveModule(nn.Module, Objective):
    """What an Objective is besides, which a Protocol cannot say; nobody needs to derive from it."""

"""InfoNCE between positions of a sample, and NT-Xent between two renderings of it, added up."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from layerwise.objectives import contrastive, pooled
from layerwise.objectives.contrastive import InfoNCE
from layerwise.objectives.pooled import NTXent
from layerwise.objectives.protocol import Score


@dataclass(frozen=True, slots=True)
class Draw:
    """What is scored at once."""

    rows: np.ndarray
    """int64 [R], sorted: those of the two together."""
    positions: contrastive.Draw
    renderings: pooled.Draw


class PositionsAndRenderings(nn.Module):
    """The sum of both losses. Windows 2m and 2m + 1 of a batch are renderings of one sample.

    What ties two places of a sample and what ties two renderings of it teach different things: see InfoNCE and NTXent.
    """

    def __init__(self, positions: InfoNCE, renderings: NTXent) -> None:
        super().__init__()
        self.positions, self.renderings = positions, renderings

    def draw(
        self,
        lengths: np.ndarray,
        frames: int,
        columns: int,
        rng: np.random.Generator,
        parts: int = 1,
        classes: np.ndarray | None = None,
    ) -> list[Draw]:
        """Shapes as in `Objective.draw`."""
        of_positions = self.positions.draw(lengths, frames, columns, rng, parts)
        of_renderings = self.renderings.draw(lengths, frames, columns, rng, parts)
        return [
            Draw(np.union1d(first.rows, second.rows), first, second)
            for first, second in zip(of_positions, of_renderings, strict=True)
        ]

    def forward(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Draw, room: int) -> Score:
        """targets (R, C) and contexts (R, D), which may be the same tensor, at the rows of the draw. Renderings are compared by
        their contexts; the accuracy is theirs."""
        at = torch.as_tensor(np.searchsorted(draw.rows, draw.positions.rows), device=contexts.device)
        of_positions = contexts.index_select(0, at)
        predicted = of_positions if targets is contexts else targets.index_select(0, at)
        positions = self.positions(predicted, of_positions, draw.positions, room)
        # NT-Xent scores all rows of the batch, which are those of the draw.
        renderings = self.renderings(contexts, contexts, draw.renderings, room)
        return Score(positions.loss + renderings.loss, renderings.accuracy)

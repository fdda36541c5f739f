"""The supervised objective: a linear classifier on the mean over a sample's frames, trained with its module.

One such classifier per module is greedy supervised learning (Belilovsky et al. 2019, arXiv 1812.11446; the baseline of
Löwe et al. 2019); one for the whole network is ordinary end-to-end training.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.objectives.pooling import Pool, pooled, real_rows
from layerwise.objectives.protocol import Score

UNLABELLED = -1
"""Class of a sample that has no label; it is passed over."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Samples that are classified in one pass. Nothing about it is random."""

    rows: np.ndarray
    """int64 [R], sorted: all real frames that are pooled."""
    pool: Pool
    classes: np.ndarray
    """int64 [B]"""
    weights: np.ndarray
    """float32 [B], 0 where there is no label. Over all passes of a batch they sum to 1, or to 0 where nothing is labelled."""


class Supervised(nn.Module):
    """Cross entropy of the samples' classes."""

    def __init__(self, context_channels: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(context_channels, classes)

    def draw(
        self,
        lengths: np.ndarray,
        frames: int,
        columns: int,
        rng: np.random.Generator,
        passes: int = 1,
        classes: np.ndarray | None = None,
    ) -> list[Draw]:
        """Shapes as in `Objective.draw`."""
        if classes is None:
            raise ValueError("the supervised objective needs the classes of the batch")
        labelled = classes != UNLABELLED
        weights = (labelled / max(labelled.sum(), 1)).astype(np.float32)
        parts = np.array_split(np.arange(len(lengths)), passes)
        return [
            Draw(
                real_rows(lengths, frames, part),
                Pool.of(lengths, frames, part),
                np.maximum(classes[part], 0),
                weights[part],
            )
            for part in parts
        ]

    def forward(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Draw, room: int) -> Score:
        """contexts (R, D) at the rows of the draw; computed in float32 at least. Targets and room are not needed."""
        device = contexts.device
        logits = self.classifier(pooled(contexts, draw.rows, draw.pool))
        classes, weights = (torch.as_tensor(each, device=device) for each in (draw.classes, draw.weights))
        loss = (weights * F.cross_entropy(logits, classes, reduction="none")).sum()
        hits = (weights * (logits.detach().argmax(1) == classes)).sum()
        return Score(loss, hits)

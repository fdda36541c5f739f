"""NT-Xent between two renderings of each sample (SimCLR; Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv 2002.05709, eq. 1).

    loss = mean over i of  -log( exp(s(i, j) / T) / sum over k other than i of exp(s(i, k) / T) )

i and j are the two renderings of a sample, k runs through all other windows of the batch, and s is the cosine of what a small
network g makes of two windows' mean representations. It is for samples without an order of frames to predict along, such as
whole pictures; windows 2m and 2m + 1 of a batch are renderings of one sample.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.objectives.pooling import Pool, pooled, real_rows
from layerwise.objectives.protocol import Score


@dataclass(frozen=True, slots=True)
class Draw:
    """What is scored in one pass. Nothing about it is random: the renderings are drawn with the batch."""

    rows: np.ndarray
    """int64 [R], sorted: all real frames that are pooled."""
    pool: Pool
    """All windows of the batch, W of them: those that are not scored in this pass are negatives all the same."""
    scored: np.ndarray
    """int64 [S], the windows that are scored, each against its partner and all others."""
    weights: np.ndarray
    """float32 [S]; over all passes of a batch they sum to 1, or to 0 where no window has a partner."""


class NTXent(nn.Module):
    """The loss, and g: a linear layer, ReLU and a linear layer, thrown away after the stage.

    channels: of the contexts; projection: width of what is compared; temperature: T.
    """

    def __init__(self, channels: int, projection: int, temperature: float) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, projection))
        self.temperature = temperature

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
        windows = np.arange(len(lengths))
        has_partner = (windows ^ 1) < len(windows)
        weights = (has_partner / max(has_partner.sum(), 1)).astype(np.float32)
        rows, pool = real_rows(lengths, frames, windows), Pool.of(lengths, frames, windows)
        return [Draw(rows, pool, part, weights[part]) for part in np.array_split(windows, passes)]

    def forward(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Draw, room: int) -> Score:
        """contexts (R, D) at the rows of the draw; computed in float32 at least. Targets and room are not needed."""
        device = contexts.device
        compared = F.normalize(self.project(pooled(contexts, draw.rows, draw.pool)), dim=1)
        scored = torch.as_tensor(draw.scored, device=device)
        partners = (scored ^ 1).clamp_max(len(compared) - 1)  # of one without a partner any will do: its weight is 0
        similarity = compared[scored] @ compared.T / self.temperature
        itself = scored[:, None] == torch.arange(len(compared), device=device)
        similarity = similarity.masked_fill(itself, -torch.inf)
        weights = torch.as_tensor(draw.weights, device=device)
        # A window without a partner would be compared with itself, at an infinite loss.
        losses = torch.where(weights > 0, F.cross_entropy(similarity, partners, reduction="none"), 0)
        hits = weights * (similarity.detach().argmax(1) == partners)
        return Score((weights * losses).sum(), hits.sum())

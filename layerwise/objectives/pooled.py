"""Objectives that score samples: the mean over their frames, or the cells of a picture side by side. NT-Xent and the supervised
objective."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.objectives.protocol import Arrays, Score

UNLABELLED = -1
"""Class of a sample that has no label; it is passed over."""


@dataclass(frozen=True, slots=True)
class Draw(Arrays):
    """What is scored at once. Nothing about it is random: two renderings of a sample are drawn with the batch."""

    rows: np.ndarray
    """int64 [R], sorted: all real frames of B neighbouring samples, numbered b * L + t over the padded batch."""
    frames: int
    """L of the padded batch."""
    first: int
    """The first of the B samples."""
    lengths: np.ndarray
    """float32 [B], real frames of each, at least 1."""
    scored: np.ndarray
    """int64 [S], the samples that are scored."""
    classes: np.ndarray
    """int64 [S], the right answer for each: the class of the sample, or the number of its other rendering."""
    weights: np.ndarray
    """float32 [S], 0 where there is no right answer. Over all parts of a batch they sum to 1, or to 0 where none has one."""


def _pooled(lengths: np.ndarray, frames: int, samples: np.ndarray) -> tuple[np.ndarray, int, int, np.ndarray]:
    """The first four fields of a draw of these neighbouring samples, int64 [B], of a batch."""
    first, lengths = int(samples[0]), lengths[samples]
    sample, frame = np.nonzero(np.arange(frames) < lengths[:, None])
    return (first + sample) * frames + frame, frames, first, np.maximum(lengths, 1).astype(np.float32)


def _means(vectors: torch.Tensor, draw: Draw) -> torch.Tensor:
    """vectors (R, C) at the rows of the draw to means (B, C), in float32 at least."""
    device, dtype = vectors.device, _at_least_float32(vectors)
    # Worked out from the rows, of which a rehearsal has more than are drawn.
    samples = torch.as_tensor(draw.rows // draw.frames - draw.first, device=device)
    lengths = torch.as_tensor(draw.lengths, device=device)
    total = torch.zeros(len(lengths), vectors.shape[1], dtype=dtype, device=device)
    return total.index_add(0, samples, vectors.to(dtype)) / lengths[:, None]


def _at_least_float32(vectors: torch.Tensor) -> torch.dtype:
    """What vectors of a lower precision are scored in, or their own."""
    return torch.promote_types(vectors.dtype, torch.float32)


CELL_WIDTH = 2
"""Hidden width of each cell, as a multiple of the projection."""


def _cross_entropy(logits: torch.Tensor, draw: Draw) -> Score:
    """Of logits (S, classes) of the samples that are scored."""
    classes, weights = (torch.as_tensor(each, device=logits.device) for each in (draw.classes, draw.weights))
    # NT-Xent would compare a window without a partner with itself, at an infinite loss.
    losses = torch.where(weights > 0, F.cross_entropy(logits, classes, reduction="none"), 0)
    hits = weights * (logits.detach().argmax(1) == classes)
    return Score((weights * losses).sum(), hits.sum())


class NTXent(nn.Module):
    """NT-Xent between two renderings of each sample (SimCLR; Chen et al., ICML 2020, arXiv 2002.05709, equation 1).

        loss = mean over i of  -log( exp(s(i, j) / T) / sum over k other than i of exp(s(i, k) / T) )

    i and j are the two renderings of a sample, k runs through all other windows of the batch, and s is the cosine of what a
    small network g makes of two windows' means, or of the cells of each side by side, by which the place of a thing matters.
    Windows 2m and 2m + 1 of a batch are renderings of one sample. It needs no order of frames to predict along, such as
    whole pictures do not have.

    g is a linear layer, ReLU and a linear layer. Of several cells, the first layer is the same for each of them and gives
    CELL_WIDTH times as much as g does, and the second one reads what it made of all. channels: of the contexts; projection:
    width of what is compared; temperature: T; cells: of each window, 1 for the mean.
    """

    def __init__(self, channels: int, projection: int, temperature: float, cells: int = 1) -> None:
        super().__init__()
        seen = channels if cells == 1 else CELL_WIDTH * projection
        self.project = nn.Sequential(nn.Linear(channels, seen), nn.ReLU(), nn.Linear(cells * seen, projection))
        self.temperature, self.cells = temperature, cells

    def draw(
        self,
        lengths: np.ndarray,
        frames: int,
        columns: int,
        rng: np.random.Generator,
        parts: int = 1,
        classes: np.ndarray | None = None,
    ) -> list[Draw]:
        """Shapes as in `Objective.draw`. Windows of another part are negatives all the same."""
        windows = np.arange(len(lengths))
        partners = windows ^ 1
        has_partner = partners < len(windows)
        weights = (has_partner / max(has_partner.sum(), 1)).astype(np.float32)
        partners = np.minimum(partners, len(windows) - 1)  # of one without a partner any will do: its weight is 0
        pooled = _pooled(lengths, frames, windows)
        return [Draw(*pooled, part, partners[part], weights[part]) for part in np.array_split(windows, parts)]

    def forward(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Draw, room: int) -> Score:
        """contexts (R, D) at the rows of the draw; computed in float32 at least. Targets and room are not needed."""
        vectors = _means(contexts, draw) if self.cells == 1 else contexts.to(_at_least_float32(contexts))
        of_cells = self.project[:-1](vectors).unflatten(0, (-1, self.cells))
        compared = F.normalize(self.project[-1](of_cells.flatten(1)), dim=1)
        scored = torch.as_tensor(draw.scored, device=contexts.device)
        similarity = compared[scored] @ compared.T / self.temperature
        itself = scored[:, None] == torch.arange(len(compared), device=contexts.device)
        similarity = similarity.masked_fill(itself, -torch.inf)
        return _cross_entropy(similarity, draw)


class Supervised(nn.Module):
    """Cross entropy of the samples' classes, which a linear classifier tells from the means.

    One such classifier per module is greedy supervised learning (Belilovsky et al. 2019, arXiv 1812.11446; the baseline of
    Löwe et al. 2019); one for the whole network is ordinary end-to-end training.
    """

    def __init__(self, context_channels: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(context_channels, classes)

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
        if classes is None:
            raise ValueError("the supervised objective needs the classes of the batch")
        labelled = classes != UNLABELLED
        weights = (labelled / max(labelled.sum(), 1)).astype(np.float32)
        return [
            Draw(*_pooled(lengths, frames, part), part, np.maximum(classes[part], 0), weights[part])
            for part in np.array_split(np.arange(len(lengths)), parts)
        ]

    def forward(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Draw, room: int) -> Score:
        """contexts (R, D) at the rows of the draw; computed in float32 at least. Targets and room are not needed."""
        return _cross_entropy(self.classifier(_means(contexts, draw)), draw)

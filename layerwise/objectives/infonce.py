"""InfoNCE over rows of frames: time steps of a sequence, or patch rows of a picture read downwards.

For a target z_t and the context c_{t-o} that lies o = k + skip rows before it (van den Oord et al. 2018, arXiv 1807.03748,
equations 3 and 4; Löwe et al. 2019, equations 3 and 4):

    f_k(z, c) = exp(z^T W_k c)        loss = - mean over k, t of log( f_k(z_t, c) / sum over z' in X of f_k(z', c) )

X holds the target and `negatives` other frames, drawn evenly from all real frames of the batch except the target itself.
A sequence is a picture with one column, so one implementation serves both.

Where this differs from the authors' code: negatives are drawn once per target and shared by the steps (there: drawn per
step for pictures); steps without a single pair in a batch of short samples leave the mean.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.objectives.protocol import Score


@dataclass(frozen=True, slots=True)
class Draw:
    """The frames of one batch that are scored. Frames are numbered b * L + t over the padded batch."""

    anchors: np.ndarray
    """int64 [B, T], the window of each sample: its frames are targets and contexts of each other."""
    negatives: np.ndarray
    """int64 [B, T, N], the negatives of each target."""
    weights: np.ndarray
    """float32 [B, T, K], the weight of target t at step k in the loss; 0 where there is no such pair; sums to 1."""
    offsets: tuple[int, ...]
    """[K], frames between a context and its target at each step."""


class InfoNCE(nn.Module):
    """Predictors W_1 to W_K, log-bilinear and without bias, and the loss.

    channels: C of the targets; context_channels: D of the contexts; steps: K; skip: rows left out between a context and
    its first target; negatives: N; anchors: rows of the window.
    """

    def __init__(
        self, channels: int, context_channels: int, steps: int, skip: int = 0, negatives: int = 10, anchors: int = 128
    ) -> None:
        super().__init__()
        self.steps, self.skip, self.negatives, self.anchors = steps, skip, negatives, anchors
        self.predictors = nn.ModuleList(nn.Linear(context_channels, channels, bias=False) for _ in range(steps))

    def draw(self, lengths: np.ndarray, frames: int, columns: int, rng: np.random.Generator) -> Draw:
        """Draws the window of each sample and the negatives of its frames. Shapes as in `Objective.draw`."""
        batch = np.arange(len(lengths))[:, None]
        rows = lengths // columns
        window = min(self.anchors, frames // columns)
        first_row = rng.integers(0, np.maximum(rows - window, 0) + 1)
        within = np.arange(window * columns)
        frame = np.minimum(first_row[:, None] * columns + within, frames - 1)
        real = frame < lengths[:, None]
        anchors = batch * frames + frame

        offsets = (np.arange(1, self.steps + 1) + self.skip) * columns
        pair = real[:, :, None] & (within[None, :, None] >= offsets)
        per_step = pair.sum((0, 1))
        weights = pair / np.maximum(per_step, 1) / max((per_step > 0).sum(), 1)

        negatives = self._draw_negatives(anchors, real, lengths, frames, rng)
        return Draw(anchors, negatives, weights.astype(np.float32), tuple(offsets.tolist()))

    def _draw_negatives(
        self, anchors: np.ndarray, real: np.ndarray, lengths: np.ndarray, frames: int, rng: np.random.Generator
    ) -> np.ndarray:
        starts = np.concatenate([[0], np.cumsum(lengths)])
        # Real frames are numbered without gaps; drawing one number fewer and stepping over the target excludes it.
        target = np.where(real, starts[:-1][:, None] + anchors % frames, starts[-1])
        drawn = rng.integers(0, max(starts[-1] - 1, 1), size=(*anchors.shape, self.negatives))
        drawn = np.minimum(drawn + (drawn >= target[:, :, None]), starts[-1] - 1)
        sample = np.searchsorted(starts, drawn, side="right") - 1
        return sample * frames + drawn - starts[sample]

    def forward(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Draw) -> Score:
        """targets (B, L, C), contexts (B, L, D); the draw must be made for the same B and L."""
        anchors = torch.as_tensor(draw.anchors, device=targets.device)
        candidates = torch.cat([anchors[:, :, None], torch.as_tensor(draw.negatives, device=targets.device)], dim=2)
        weights = torch.as_tensor(draw.weights, device=targets.device)

        # One gather and one product for all steps: candidates (B, T, 1 + N, C), predictions (B, T, K, C).
        z = F.embedding(candidates, targets.flatten(0, 1))
        predictions = self._predict(contexts.flatten(0, 1)[anchors], draw.offsets)
        logits = z @ predictions.transpose(2, 3)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast leaves them in bfloat16

        loss = (weights * -F.log_softmax(logits, dim=2)[:, :, 0]).sum()
        hits = logits[:, :, 0] > logits[:, :, 1:].amax(dim=2)
        return Score(loss, (weights * hits).sum().detach())

    def _predict(self, contexts: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
        """Contexts (B, T, D) to predictions (B, T, K, C) that stand at the target they predict, zero where there is none."""
        frames = contexts.shape[1]
        shifted = [
            F.pad(predictor(contexts[:, : max(frames - offset, 0)]), (0, 0, min(offset, frames), 0))
            for predictor, offset in zip(self.predictors, offsets, strict=True)
        ]
        return torch.stack(shifted, dim=2)

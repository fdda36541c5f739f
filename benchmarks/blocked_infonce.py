"""InfoNCE and its gradients, a block of targets at a time, for as many predictors as lie on the device: written for little
memory. Beside representations, predictors and their gradients it needs the room of one block."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from layerwise.objectives.contrastive import Draw


@dataclass(frozen=True)
class Scored:
    """What is scored, on the device; A anchors, N negatives of each."""

    anchors: torch.Tensor
    """int64 [A], rows of the representations; contexts and targets of each other."""
    candidates: torch.Tensor
    """int64 [A, 1 + N], rows of the target and its negatives."""
    weights: torch.Tensor
    """float32 [A, K], of each target at each step."""
    offsets: tuple[int, ...]
    """[K], anchors between a context and its target."""

    @classmethod
    def of(cls, draw: Draw, device: torch.device) -> "Scored":
        anchors = torch.as_tensor(draw.anchors, device=device)
        candidates = torch.cat([anchors[:, None], torch.as_tensor(draw.negatives, device=device)], dim=1)
        return cls(anchors, candidates, torch.as_tensor(draw.weights, device=device), draw.offsets)


def add_gradients(
    targets: torch.Tensor,
    contexts: torch.Tensor,
    predictors: torch.Tensor,
    scored: Scored,
    steps: slice,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    room: int,
) -> torch.Tensor:
    """The loss of some steps, at targets (R, C), contexts (R, D) and their predictors (k, C, D); adds to the gradients of the
    three. room: bytes that a block may take."""
    grad_targets, grad_contexts, grad_predictors = gradients
    count, channels, _ = predictors.shape
    offsets = scored.offsets[steps]
    candidates = scored.candidates.shape[1]
    size = max(room // (4 * channels * (candidates + 2 * count)), 1)
    loss = targets.new_zeros(())
    for start in range(min(offsets), len(scored.anchors), size):
        rows = scored.candidates[start : start + size]
        weights = scored.weights[start : start + size, steps]
        z = targets[rows]
        predictions = targets.new_zeros(len(rows), count, channels)
        for prediction, context, step in _pairs(predictions, scored.anchors, start, offsets):
            torch.mm(contexts[context], predictors[step].t(), out=prediction)
        scores = torch.bmm(z, predictions.transpose(1, 2))
        scores -= scores.logsumexp(1, keepdim=True)
        loss -= (weights * scores[:, 0]).sum()
        grad_scores = scores.exp_()
        grad_scores[:, 0] -= 1
        grad_scores *= weights[:, None]
        grad_predictions = torch.bmm(grad_scores.transpose(1, 2), z)
        torch.bmm(grad_scores, predictions, out=z)  # the gradients of the candidates take their room
        grad_targets.index_add_(0, rows.flatten(), z.flatten(0, 1))
        for gradient, context, step in _pairs(grad_predictions, scored.anchors, start, offsets):
            grad_predictors[step].addmm_(gradient.t(), contexts[context])
            grad_contexts.index_add_(0, context, gradient @ predictors[step])
    return loss


def _pairs(
    at_targets: torch.Tensor, anchors: torch.Tensor, start: int, offsets: tuple[int, ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """For each step, its column of at_targets (n, k, C), which belongs to the anchors from `start` on, and the rows of its
    contexts; without targets that stand too near the beginning to have one."""
    stop = start + len(at_targets)
    for step, offset in enumerate(offsets):
        first = min(max(offset, start), stop)
        yield at_targets[first - start :, step], anchors[first - offset : stop - offset], step

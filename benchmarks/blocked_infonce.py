"""InfoNCE and its gradients, a block of targets at a time, for as many predictors as lie on the device: written for little
memory. Beside representations, predictors and their gradients it needs the room of one block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from host import Host

from layerwise.memory.meter import uncounted
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


class Contexts(Protocol):
    """Contexts by their anchors, wherever they lie, and their gradients."""

    def take(self, piece: slice) -> torch.Tensor:
        """(n, D) on the device, of these anchors."""

    def add(self, piece: slice, gradients: torch.Tensor) -> None:
        """(n, D), to what there is."""


@dataclass(frozen=True)
class OnDevice:
    """Contexts (R, D) and their gradients."""

    contexts: torch.Tensor
    gradients: torch.Tensor
    anchors: torch.Tensor

    def take(self, piece: slice) -> torch.Tensor:
        return self.contexts[self.anchors[piece]]

    def add(self, piece: slice, gradients: torch.Tensor) -> None:
        self.gradients.index_add_(0, self.anchors[piece], gradients)


@dataclass(frozen=True)
class OnHost:
    """Contexts (R, D) and their gradients, which are too many for the device: each predictor has them come up, block by
    block, and what it adds to their gradients go down."""

    host: Host
    contexts: torch.Tensor
    gradients: torch.Tensor
    anchors: torch.Tensor

    @classmethod
    def of(cls, host: Host, contexts: torch.Tensor, gradients: torch.Tensor, draw: Draw) -> "OnHost":
        """contexts and gradients (B, L, D) on the host."""
        return cls(host, contexts.flatten(0, 1), gradients.flatten(0, 1), torch.from_numpy(draw.anchors))

    def take(self, piece: slice) -> torch.Tensor:
        with uncounted():
            rows = self.anchors[piece]
        return self.host.up_rows(self.contexts, rows)

    def add(self, piece: slice, gradients: torch.Tensor) -> None:
        with uncounted():
            rows = self.anchors[piece]
        self.host.add(gradients, self.gradients, rows)


def add_gradients(
    targets: torch.Tensor,
    contexts: Contexts,
    predictors: torch.Tensor,
    scored: Scored,
    steps: slice,
    grad_targets: torch.Tensor,
    grad_predictors: torch.Tensor,
    room: int,
) -> torch.Tensor:
    """The loss of some steps, at targets (R, C), contexts and the steps' predictors (k, C, D); adds to the gradients of the
    three. room: bytes that a block may take."""
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
        of_steps = [contexts.take(piece) for _, piece in _pairs(predictions, start, offsets)]
        for (prediction, _), predictor, context in zip(
            _pairs(predictions, start, offsets), predictors, of_steps, strict=True
        ):
            torch.mm(context, predictor.t(), out=prediction)
        scores = torch.bmm(z, predictions.transpose(1, 2))
        scores -= scores.logsumexp(1, keepdim=True)
        loss -= (weights * scores[:, 0]).sum()
        grad_scores = scores.exp_()
        grad_scores[:, 0] -= 1
        grad_scores *= weights[:, None]
        grad_predictions = torch.bmm(grad_scores.transpose(1, 2), z)
        torch.bmm(grad_scores, predictions, out=z)  # the gradients of the candidates take their room
        grad_targets.index_add_(0, rows.flatten(), z.flatten(0, 1))
        for step, (gradient, piece) in enumerate(_pairs(grad_predictions, start, offsets)):
            grad_predictors[step].addmm_(gradient.t(), of_steps[step])
            contexts.add(piece, gradient @ predictors[step])
    return loss


def _pairs(at_targets: torch.Tensor, start: int, offsets: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, slice]]:
    """For each step, its column of at_targets (n, k, C), which belongs to the anchors from `start` on, and the anchors that
    are its contexts; without targets that stand too near the beginning to have one."""
    stop = start + len(at_targets)
    for step, offset in enumerate(offsets):
        first = min(max(offset, start), stop)
        yield at_targets[first - start :, step], slice(first - offset, stop - offset)

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
    """What is scored, on the device; T targets, N negatives of each."""

    contexts: torch.Tensor
    """int64 [T + (K - 1) * apart], rows of the representations: of target i at step k, from 0, it is number i + k * apart."""
    candidates: torch.Tensor
    """int64 [S, T, 1 + N], rows of the target and its negatives; S is 1 where all steps share them, else K."""
    weights: torch.Tensor
    """float32 [T, K], of each target at each step."""
    apart: int

    @classmethod
    def of(cls, draw: Draw, device: torch.device) -> "Scored":
        numbers = (torch.as_tensor(each, device=device) for each in (draw.contexts, draw.candidates, draw.weights))
        return cls(*numbers, draw.apart)


class Contexts(Protocol):
    """Contexts by their numbers, wherever they lie, and their gradients."""

    def take(self, piece: slice) -> torch.Tensor:
        """(n, D) on the device, of these contexts."""

    def add(self, piece: slice, gradients: torch.Tensor) -> None:
        """(n, D), to what there is."""


@dataclass(frozen=True)
class OnDevice:
    """Contexts (R, D) and their gradients."""

    contexts: torch.Tensor
    gradients: torch.Tensor
    numbers: torch.Tensor

    def take(self, piece: slice) -> torch.Tensor:
        return self.contexts[self.numbers[piece]]

    def add(self, piece: slice, gradients: torch.Tensor) -> None:
        self.gradients.index_add_(0, self.numbers[piece], gradients)


@dataclass(frozen=True)
class OnHost:
    """Contexts (R, D) and their gradients, which are too many for the device: each predictor has them come up, block by
    block, and what it adds to their gradients go down."""

    host: Host
    contexts: torch.Tensor
    gradients: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def of(cls, host: Host, contexts: torch.Tensor, gradients: torch.Tensor, draw: Draw) -> "OnHost":
        """contexts and gradients (B, L, D) on the host."""
        return cls(host, contexts.flatten(0, 1), gradients.flatten(0, 1), torch.from_numpy(draw.contexts))

    def take(self, piece: slice) -> torch.Tensor:
        with uncounted():
            rows = self.numbers[piece]
        return self.host.up_rows(self.contexts, rows)

    def add(self, piece: slice, gradients: torch.Tensor) -> None:
        with uncounted():
            rows = self.numbers[piece]
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
    numbers = range(scored.weights.shape[1])[steps]
    if count > 1 and len(scored.candidates) > 1:  # what they do not share cannot be scored at once
        each = [
            add_gradients(
                targets,
                contexts,
                predictors[at : at + 1],
                scored,
                slice(number, number + 1),
                grad_targets,
                grad_predictors[at : at + 1],
                room,
            )
            for at, number in enumerate(numbers)
        ]
        return torch.stack(each).sum()
    first, of_targets = numbers.start, scored.candidates[numbers.start if len(scored.candidates) > 1 else 0]
    targets_left = len(of_targets) - first * scored.apart
    candidates = of_targets.shape[1]
    size = max(room // (4 * channels * (candidates + 2 * count)), 1)
    loss = targets.new_zeros(())
    for start in range(0, targets_left, size):
        rows = of_targets[start : min(start + size, targets_left)]
        weights = scored.weights[start : start + len(rows), steps]
        z = targets[rows]
        predictions = targets.new_zeros(len(rows), count, channels)
        of_steps = [contexts.take(piece) for _, piece in _pairs(predictions, start, first, scored)]
        for (prediction, _), predictor, context in zip(
            _pairs(predictions, start, first, scored), predictors, of_steps, strict=True
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
        for step, (gradient, piece) in enumerate(_pairs(grad_predictions, start, first, scored)):
            grad_predictors[step].addmm_(gradient.t(), of_steps[step])
            contexts.add(piece, gradient @ predictors[step])
    return loss


def _pairs(at_targets: torch.Tensor, start: int, first: int, scored: Scored) -> Iterator[tuple[torch.Tensor, slice]]:
    """For each step from `first` on, its column of at_targets (n, k, C), which belongs to the targets from `start` on, and
    their contexts; without the last targets, which have none at later steps."""
    for step in range(at_targets.shape[1]):
        ahead = (first + step) * scored.apart
        stop = max(min(start + len(at_targets), len(scored.weights) - ahead), start)
        yield at_targets[: stop - start, step], slice(start + ahead, stop + ahead)

"""Contrastive objectives over rows of frames: time steps of a sequence, or patch rows of a picture read downwards.

A target z_t and the context c_{t-o} that lies o = k + skip rows before it have the score z_t^T W_k c_{t-o}; so has each of
`negatives` other frames in the place of z_t, the target itself never among them. Of a sequence they are drawn evenly from all
real frames of the batch. Of a picture they are drawn for each step from the frames that are targets of that step: the first
rows never are, and a negative from there would be told by its height alone. `InfoNCE` and `Hinge` differ in the loss that they
make of the scores. A sequence is a picture with one column, so one implementation serves both.

Only frames that are scored come in, each once. The loss is computed in slices of targets, together with its gradients, so
candidates (targets x negatives x channels) and predictions never exist for more than one slice, and no product is computed
twice.

Where this differs from the code of Greedy InfoMax: a target is never its own negative (there: as likely as any other frame);
of sequences, negatives are drawn once per target and shared by the steps; steps without a single pair in a batch of short
samples leave the mean.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from layerwise.objectives.protocol import Arrays, Group, Score

Numbers = np.ndarray | torch.Tensor
"""Of the host or of the device; see `Arrays`."""


@dataclass(frozen=True, slots=True)
class Draw(Arrays):
    """What is scored at once.

    The windows of all samples lie side by side, the last frames first: before frame t of sample b of B comes that of sample
    b - 1, and B places on frame t - 1 of sample b. So the contexts of all targets of a step are one run of frames, and those
    of the next step the same run `apart` places on. A target at step k that has no context there has the weight 0; any frame
    stands for its context.
    """

    rows: np.ndarray
    """int64 [R], sorted: the frames that are scored, numbered b * L + t over the padded batch."""
    candidates: Numbers
    """int64 [S, T, 1 + N], where each target and its negatives lie in `rows`; S is 1 where all steps share them, else K."""
    contexts: Numbers
    """int64 [T + (K - 1) * apart], where contexts lie in `rows`: of target i at step k, from 0, it is number i + k * apart."""
    weights: Numbers
    """float32 [T, K], the weight of each target at each step in the loss; 0 where there is no such pair. Over all parts
    of a batch they sum to 1."""
    apart: int
    """Places from one step to the next: a row of all samples."""


OfScores = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Scores (n, 1 + N, K), the targets' first, and weights (n, K) to the weighted sum of the losses and its gradient with
respect to the scores, which may overwrite them."""


ALL = slice(None)


class Contrastive(nn.Module):
    """Predictors W_1 to W_K, bilinear and without bias, and the loss.

    channels: C of the targets; context_channels: D of the contexts; steps: K; skip: rows left out between a context and
    its first target; negatives: N; anchors: rows of the window; projection: P, most channels that the predictors see, 0
    for all; shared: whether contexts are projected by the matrix of the targets, as where they are the same tensor.

    Targets and contexts of more than P channels go through a linear map to P of them first, so that a predictor has P x P
    numbers and not C x D. Then W_k is a product of matrices whose rank is at most P.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        steps: int,
        skip: int = 0,
        negatives: int = 10,
        anchors: int = 128,
        projection: int = 0,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.steps, self.skip, self.negatives, self.anchors = steps, skip, negatives, anchors
        self.project = _projection(channels, projection)
        self.project_contexts = None if shared else _projection(context_channels, projection)
        if projection:
            channels, context_channels = min(channels, projection), min(context_channels, projection)
        # As nn.Linear begins.
        bound = context_channels**-0.5
        self.predictors = nn.Parameter(torch.empty(steps, channels, context_channels).uniform_(-bound, bound))

    @staticmethod
    def of_scores(scores: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See OfScores; each objective has its own."""
        raise NotImplementedError

    def draw(
        self,
        lengths: np.ndarray,
        frames: int,
        columns: int,
        rng: np.random.Generator,
        parts: int = 1,
        classes: np.ndarray | None = None,
    ) -> list[Draw]:
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
        weights = (pair / np.maximum(per_step, 1) / max((per_step > 0).sum(), 1)).astype(np.float32)

        if columns > 1:
            negatives = self._draw_from_targets(anchors, pair, rng)
        else:
            drawn = self._draw_from_all(anchors, real, lengths, frames, rng)
            # A target without any pair is not scored, and neither are its negatives.
            negatives = np.where(pair.any(2)[:, :, None], drawn, anchors[:, :, None])[:, :, None]
        samples = np.array_split(np.arange(len(lengths)), parts)
        return [_compact(anchors[part], negatives[part], weights[part], columns, int(offsets[0])) for part in samples]

    def _draw_from_targets(self, anchors: np.ndarray, pair: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int64 [B, W, K, N], from the targets of each step; the frame itself where it is none."""
        negatives = np.broadcast_to(anchors[:, :, None, None], (*pair.shape, self.negatives)).copy()
        for step in range(self.steps):
            targets = anchors[pair[:, :, step]]
            drawn = rng.integers(0, max(len(targets) - 1, 1), size=(len(targets), self.negatives))
            # One target fewer is drawn from, and the own one stepped over, which excludes it.
            drawn = np.minimum(drawn + (drawn >= np.arange(len(targets))[:, None]), len(targets) - 1)
            negatives[pair[:, :, step], step] = targets[drawn]
        return negatives

    def _draw_from_all(
        self, anchors: np.ndarray, real: np.ndarray, lengths: np.ndarray, frames: int, rng: np.random.Generator
    ) -> np.ndarray:
        """int64 [B, W, N], from all real frames of the batch."""
        starts = np.concatenate([[0], np.cumsum(lengths)])
        # Real frames are numbered without gaps; drawing one number fewer and stepping over the target excludes it.
        target = np.where(real, starts[:-1][:, None] + anchors % frames, starts[-1])
        drawn = rng.integers(0, max(starts[-1] - 1, 1), size=(*anchors.shape, self.negatives))
        drawn = np.minimum(drawn + (drawn >= target[:, :, None]), starts[-1] - 1)
        sample = np.repeat(np.arange(len(lengths)), lengths)[drawn]
        return sample * frames + drawn - starts[sample]

    def forward(self, targets: torch.Tensor, contexts: torch.Tensor, draw: Draw, room: int) -> Score:
        """targets (R, C), contexts (R, D) at the rows of the draw; computed in float32 at least. room: bytes of a slice."""
        targets, contexts = self._compared(targets, contexts)
        if not torch.is_grad_enabled():
            return _score(targets, contexts, [(ALL, self.predictors, None)], draw, room, self.of_scores, None)
        own_contexts = None if contexts is targets else contexts
        return Score(*_Loss.apply(targets, own_contexts, self.predictors, None, draw, room, self.of_scores))

    @property
    def stacked(self) -> nn.Parameter:
        """See `Streamed`."""
        return self.predictors

    def targets_at_once(self, room: int, at_once: int) -> int:
        """See `Streamed`."""
        return _targets_of_slice(room, self.predictors[:at_once], 1 + self.negatives)

    def streamed(
        self, targets: torch.Tensor, contexts: torch.Tensor, draw: Draw, room: int, groups: Iterable[Group]
    ) -> Score:
        """See `Streamed`."""
        targets, contexts = self._compared(targets, contexts)
        if not torch.is_grad_enabled():
            return _score(targets, contexts, groups, draw, room, self.of_scores, None)
        own_contexts = None if contexts is targets else contexts
        return Score(*_Loss.apply(targets, own_contexts, None, groups, draw, room, self.of_scores))

    def _compared(self, targets: torch.Tensor, contexts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, C) and (R, D) to what the predictors see of them, in float32 at least; one tensor where they are one."""
        shared, targets = contexts is targets, targets.to(torch.promote_types(targets.dtype, torch.float32))
        contexts = targets if shared else contexts.to(targets.dtype)
        projected = self.project(targets)
        if self.project_contexts is not None:
            return projected, self.project_contexts(contexts)
        return projected, projected if contexts is targets else self.project(contexts)


def _projection(channels: int, most: int) -> nn.Module:
    """A linear map to `most` channels, where there are more than that; most: 0 for no limit."""
    return nn.Linear(channels, most, bias=False) if 0 < most < channels else nn.Identity()


def _compact(anchors: np.ndarray, negatives: np.ndarray, weights: np.ndarray, apart: int, first: int) -> Draw:
    """Numbers the frames of windows [B, W] and their negatives [B, W, S, N] by the rows that occur, the last frames first.

    apart, first: frames of a window between contexts of neighbouring steps, and between a target and its first context.
    """
    samples, window, draws, count = negatives.shape
    own = np.broadcast_to(anchors[:, :, None, None], (samples, window, draws, 1))
    scored = np.concatenate([own, negatives], axis=3).transpose(2, 1, 0, 3)[:, ::-1]
    scored = scored.reshape(draws, window * samples, 1 + count)
    # By a table of all frames, which np.unique would sort.
    occurs = np.zeros(scored.max() + 1, dtype=bool)
    occurs[scored] = True
    rows = np.flatnonzero(occurs)
    number_of = np.empty(len(occurs), dtype=np.int64)
    number_of[rows] = np.arange(len(rows))
    numbers, steps = number_of[scored], weights.shape[2]
    apart, first = apart * samples, first * samples
    targets = max(window * samples - first, 0)
    behind = np.arange(first, first + targets + (steps - 1) * apart * (targets > 0))
    return Draw(
        rows=rows,
        candidates=np.ascontiguousarray(numbers[:, :targets]),
        contexts=numbers[0, np.minimum(behind, window * samples - 1), 0],
        weights=np.ascontiguousarray(weights.swapaxes(0, 1)[::-1]).reshape(window * samples, steps)[:targets],
        apart=apart,
    )


class _Loss(torch.autograd.Function):
    """The loss, whose gradients are computed along with it: the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: torch.Tensor,
        contexts: torch.Tensor | None,
        predictors: torch.Tensor | None,
        groups: Iterable[Group],
        draw: Draw,
        room: int,
        of_scores: OfScores,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """contexts: None where they are the targets; predictors: None where `groups` brings them."""
        grad_targets = torch.zeros_like(targets)
        grad_contexts = None if contexts is None else torch.zeros_like(contexts)
        grad_predictors = None if predictors is None else torch.zeros_like(predictors)
        if predictors is not None:
            groups = [(ALL, predictors, grad_predictors)]
        gradients = grad_targets, grad_targets if grad_contexts is None else grad_contexts
        contexts = targets if contexts is None else contexts
        score = _score(targets, contexts, groups, draw, room, of_scores, gradients)
        ctx.gradients = grad_targets, grad_contexts, grad_predictors
        ctx.mark_non_differentiable(score.accuracy)
        return score.loss, score.accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # No longer held here, the predictors' gradient is taken over by autograd without a copy.
        gradients, ctx.gradients = ctx.gradients, ()
        return *(None if gradient is None else gradient.mul_(loss) for gradient in gradients), None, None, None, None


def _score(
    targets: torch.Tensor,
    contexts: torch.Tensor,
    groups: Iterable[Group],
    draw: Draw,
    room: int,
    of_scores: OfScores,
    gradients: tuple[torch.Tensor, torch.Tensor] | None,
) -> Score:
    """The score at targets (R, C) and contexts (R, D); adds to their gradients, where there are any, and to the predictors'."""
    score = Score(targets.new_zeros(()), targets.new_zeros(()))
    for steps, predictors, gradient in groups:
        for group in _scored_at_once((steps, predictors, gradient), draw):
            _add_group(score, targets, contexts, group, draw, room, of_scores, gradients)
            del group
        del predictors, gradient
    return score


def _scored_at_once(group: Group, draw: Draw) -> list[Group]:
    """Steps that share their candidates; others one by one."""
    steps, predictors, gradient = group
    if len(draw.candidates) == 1:
        return [group]
    numbers = range(draw.weights.shape[1])[steps]
    return [
        (slice(number, number + 1), predictors[at : at + 1], None if gradient is None else gradient[at : at + 1])
        for at, number in enumerate(numbers)
    ]


def _add_group(
    score: Score,
    targets: torch.Tensor,
    contexts: torch.Tensor,
    group: Group,
    draw: Draw,
    room: int,
    of_scores: OfScores,
    gradients: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Adds the part of the score that comes from some steps, and its gradients."""
    steps, predictors, grad_predictors = group
    count, channels, _ = predictors.shape
    apart, first, device = draw.apart, range(draw.weights.shape[1])[steps].start, targets.device
    numbers = draw.candidates[first if len(draw.candidates) > 1 else 0]
    # The last targets have no context at the first of these steps.
    scored, candidates = max(len(draw.weights) - first * apart, 0), numbers.shape[1]
    size = min(scored, _targets_of_slice(room, predictors, candidates))
    z_room = targets.new_empty(size, candidates, channels)
    prediction_room = targets.new_empty(size * count * channels)
    grad_prediction_room = None if gradients is None else torch.empty_like(prediction_room)
    starts = range(0, scored, max(size, 1))
    rehearsed = isinstance(targets, FakeTensor)
    if rehearsed:  # no slice takes more than the first two
        starts = starts[:2]
    for start in starts:
        number = min(size, scored - start)
        at = min(count, -(-(scored - start) // apart))  # steps at which any of these targets has a context
        weight = torch.as_tensor(
            draw.weights[start : start + number, first : first + at], device=device, dtype=targets.dtype
        )
        rows = torch.as_tensor(numbers[start : start + number], device=device).flatten()
        begin = start + first * apart
        of_contexts = torch.as_tensor(draw.contexts[begin : begin + number + (at - 1) * apart], device=device)
        run = contexts.index_select(0, of_contexts)
        # (at, number, D): the contexts of each step are a piece of the run, `apart` places behind those of the one before.
        of_steps = run.as_strided((at, number, run.shape[1]), (apart * run.shape[1], run.shape[1], 1))
        z = z_room[:number]
        torch.index_select(targets, 0, rows, out=z.flatten(0, 1))
        predictions = prediction_room[: number * at * channels].view(at, number, channels)
        torch.bmm(of_steps, predictors[:at].transpose(1, 2), out=predictions)
        predictions = predictions.transpose(0, 1)
        scores = torch.bmm(z, predictions.transpose(1, 2))
        score.accuracy.add_((weight * (scores[:, 0] > scores[:, 1:].amax(1))).sum())
        loss, grad_scores = of_scores(scores, weight)
        score.loss.add_(loss)
        if gradients is not None and grad_prediction_room is not None and grad_predictors is not None:
            grad_targets, grad_contexts = gradients
            grad_predictions = grad_prediction_room[: number * at * channels].view(number, at, channels)
            torch.bmm(grad_scores.transpose(1, 2), z, out=grad_predictions)
            # The candidates are not needed any more: their gradients take their room.
            torch.bmm(grad_scores, predictions, out=z)
            grad_targets.index_add_(0, rows, z.flatten(0, 1))
            grad_predictors[:at].baddbmm_(grad_predictions.permute(1, 2, 0), of_steps)
            # Nor are the predictions: the gradients of the contexts take theirs, where it is enough.
            enough = run.numel() <= len(prediction_room)
            grad_run = prediction_room[: run.numel()].view_as(run).zero_() if enough else torch.zeros_like(run)
            # The pieces overlap, so they are added up one by one. None takes room, so one is enough of a rehearsal.
            for step in range(1 if rehearsed else at):
                piece = grad_run[step * apart : step * apart + number]
                piece.addmm_(grad_predictions[:, step], predictors[step])
            grad_contexts.index_add_(0, of_contexts, grad_run)
            del grad_run
        del run, of_steps, scores, grad_scores


def _targets_of_slice(room: int, predictors: torch.Tensor, candidates: int) -> int:
    """For each target there are candidates, predictions, gradients of these, a context and its gradient."""
    count, channels, context_channels = predictors.shape
    numbers = (candidates + 2 * count) * channels + 2 * context_channels
    return max(room // (predictors.element_size() * numbers), 1)


class InfoNCE(Contrastive):
    """Tells the target from its negatives, as a classifier of 1 + N classes would.

        f_k(z, c) = exp(z^T W_k c)        loss = - mean over k, t of log( f_k(z_t, c) / sum over z' in X of f_k(z', c) )

    X holds the target and its negatives (van den Oord et al. 2018, arXiv 1807.03748, and Löwe et al. 2019: both equations 3
    and 4).
    """

    @staticmethod
    def of_scores(scores: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See OfScores."""
        log_probability = scores.log_softmax(1)
        loss = -(weights * log_probability[:, 0]).sum()
        of_scores = log_probability.exp_()
        of_scores[:, 0] -= 1
        of_scores *= weights[:, None]
        return loss, of_scores


class Hinge(Contrastive):
    """The hinge loss of CLAPP (Illing, Ventura, Bellec, Gerstner, NeurIPS 2021, arXiv 2010.08262, equation 3).

        loss = mean over k, t of  max(0, 1 - z_t^T W_k c)  +  mean over z' of max(0, 1 + z'^T W_k c)

    The first term asks that the future be predicted, the second that the negatives z' be not. CLAPP sees one of the two at a
    time, with one negative; both at once is their mean over time ("synchronous" in the paper), and has half the noise.
    """

    @staticmethod
    def of_scores(scores: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See OfScores."""
        negatives = scores.shape[1] - 1
        short = scores.neg_()  # by how much a score falls short of its margin
        short[:, 1:].neg_()
        short += 1
        wrong = (short > 0).to(scores.dtype)
        loss = (weights * (short[:, 0].relu() + short[:, 1:].relu().mean(1))).sum()
        of_scores = wrong.mul_(weights[:, None])
        of_scores[:, 0].neg_()
        of_scores[:, 1:] /= negatives
        return loss, of_scores

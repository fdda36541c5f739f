"""The hinge loss against its formula, in float64 under plain autograd."""

import numpy as np
import pytest
import torch

from layerwise.memory.host import HostMemory
from layerwise.objectives.contrastive import Hinge, InfoNCE

WIDE = 2**30
FRAMES, CHANNELS, STEPS, NEGATIVES = 14, 5, 3, 4


def outcome(kind: type[Hinge] | type[InfoNCE], parts: int, room: int, at_once: int = 0) -> list[torch.Tensor]:
    """Loss and gradients of targets, contexts and predictors. at_once: predictors that are there at a time; 0: all."""
    torch.manual_seed(0)
    z = torch.randn(3 * FRAMES, CHANNELS, dtype=torch.double, requires_grad=True)
    c = torch.randn(3 * FRAMES, CHANNELS + 1, dtype=torch.double, requires_grad=True)
    objective = kind(CHANNELS, CHANNELS + 1, STEPS, negatives=NEGATIVES, anchors=9).double()
    rng, lengths = np.random.default_rng(0), np.array([14, 9, 11])
    loss = torch.zeros((), dtype=torch.double)
    for draw in objective.draw(lengths, 14, 1, rng, parts):
        if at_once:
            groups = HostMemory().visits(objective.predictors, at_once, torch.device("cpu"), graded=True)
            loss = loss + objective.streamed(z[draw.rows], c[draw.rows], draw, room, groups).loss
        else:
            loss = loss + objective(z[draw.rows], c[draw.rows], draw, room).loss
    loss.backward()
    return [loss.detach(), z.grad, c.grad, objective.predictors.grad]


def plain_outcome() -> list[torch.Tensor]:
    torch.manual_seed(0)
    z = torch.randn(3 * FRAMES, CHANNELS, dtype=torch.double, requires_grad=True)
    c = torch.randn(3 * FRAMES, CHANNELS + 1, dtype=torch.double, requires_grad=True)
    objective = Hinge(CHANNELS, CHANNELS + 1, STEPS, negatives=NEGATIVES, anchors=9).double()
    (draw,) = objective.draw(np.array([14, 9, 11]), 14, 1, np.random.default_rng(0))
    per_step = []
    for step, predictor in enumerate(objective.predictors):
        losses = []
        for target in np.flatnonzero(draw.weights[:, step]).tolist():
            context = c[draw.rows[draw.contexts[target + step * draw.apart]]]
            score = z[draw.rows] @ predictor @ context
            positive, negatives = score[draw.candidates[0, target, 0]], score[draw.candidates[0, target, 1:]]
            losses.append((1 - positive).clamp(min=0) + (1 + negatives).clamp(min=0).mean())
        per_step.append(torch.stack(losses).mean())
    loss = torch.stack(per_step).mean()
    loss.backward()
    return [loss.detach(), z.grad, c.grad, objective.predictors.grad]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("room", [WIDE, 1])
@pytest.mark.parametrize("at_once", [0, 1, 2])
def test_the_lean_loss_is_the_formula(parts: int, room: int, at_once: int) -> None:
    for lean, plain in zip(outcome(Hinge, parts, room, at_once), plain_outcome(), strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-6, atol=1e-9)  # weights are float32


def test_it_is_not_infonce() -> None:
    assert not torch.allclose(outcome(Hinge, 1, WIDE)[0], outcome(InfoNCE, 1, WIDE)[0])


def test_scores_beyond_their_margin_cost_nothing() -> None:
    scores = torch.tensor([[[2.0], [-3.0], [-1.5]]])
    loss, gradient = Hinge.of_scores(scores.clone(), torch.ones(1, 1))
    assert loss == 0
    assert not gradient.any()

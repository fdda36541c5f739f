"""NT-Xent against the formula of the paper, worked out window by window."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.objectives.pooled import NTXent


def drawn(objective: NTXent, lengths: list[int], parts: int = 1) -> list:
    return objective.draw(np.array(lengths), max(lengths), 1, np.random.default_rng(0), parts)


def by_the_formula(objective: NTXent, samples: list[torch.Tensor]) -> float:
    compared = [F.normalize(objective.project(frames.mean(0)), dim=0) for frames in samples]
    losses = []
    for i, own in enumerate(compared):
        scores = [math.exp(float(own @ other) / objective.temperature) for other in compared]
        losses.append(-math.log(scores[i ^ 1] / (sum(scores) - scores[i])))
    return sum(losses) / len(losses)


@pytest.fixture
def objective() -> NTXent:
    torch.manual_seed(0)
    return NTXent(5, 3, 0.5)


@pytest.fixture
def of_cells() -> NTXent:
    torch.manual_seed(0)
    return NTXent(5, 3, 0.5, cells=4)


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [3, 1, 2, 3, 1, 1]])
def test_it_is_the_formula_of_the_paper(objective: NTXent, lengths: list[int]) -> None:
    samples = [torch.randn(length, 5) for length in lengths]
    (draw,) = drawn(objective, lengths)
    score = objective(torch.cat(samples), torch.cat(samples), draw, 0)
    assert float(score.loss) == pytest.approx(by_the_formula(objective, samples), rel=1e-5)


def test_cells_are_compared_side_by_side_so_that_their_place_matters(of_cells: NTXent) -> None:
    samples = torch.randn(6, 4, 5)
    (draw,) = drawn(of_cells, [4] * 6)
    score = of_cells(samples.flatten(0, 1), samples.flatten(0, 1), draw, 0)
    moved = torch.cat([samples[:1].flip(1), samples[1:]]).flatten(0, 1)
    assert abs(float(of_cells(moved, moved, draw, 0).loss) - float(score.loss)) > 1e-3
    *first, last = of_cells.project
    seen = [nn.Sequential(*first)(sample).reshape(1, -1) for sample in samples]
    of_cells.project = last
    assert float(score.loss) == pytest.approx(by_the_formula(of_cells, seen), rel=1e-5)


@pytest.mark.parametrize("name", ["objective", "of_cells"])
def test_the_losses_and_gradients_of_the_parts_add_up_to_the_batch(name: str, request: pytest.FixtureRequest) -> None:
    objective = request.getfixturevalue(name)
    frames = torch.randn(6 * objective.cells, 5, requires_grad=True)
    (whole,) = drawn(objective, [objective.cells] * 6)
    objective(frames, frames, whole, 0).loss.backward()
    gradient, frames.grad = frames.grad, None
    for draw in drawn(objective, [objective.cells] * 6, parts=4):
        objective(frames, frames, draw, 0).loss.backward()
    assert torch.allclose(frames.grad, gradient, atol=1e-6)


def test_renderings_of_a_sample_that_are_alike_score_well_and_others_badly(objective: NTXent) -> None:
    frames = torch.randn(4, 5).repeat_interleave(2, 0)
    (draw,) = drawn(objective, [1] * 8)
    alike = objective(frames, frames, draw, 0)
    apart = objective(frames[[0, 2, 4, 6, 1, 3, 5, 7]], frames[[0, 2, 4, 6, 1, 3, 5, 7]], draw, 0)
    assert float(alike.accuracy) == 1
    assert float(apart.loss) > float(alike.loss)


def test_a_window_without_a_partner_leaves_the_loss_and_its_gradient_finite(objective: NTXent) -> None:
    frames = torch.randn(3, 5, requires_grad=True)
    (draw,) = drawn(objective, [1, 1, 1])
    loss = objective(frames, frames, draw, 0).loss
    loss.backward()
    assert loss.isfinite()
    assert frames.grad.isfinite().all()

"""InfoNCE between positions and NT-Xent between renderings, added up."""

import numpy as np
import pytest
import torch

from layerwise.objectives.both import PositionsAndRenderings
from layerwise.objectives.contrastive import InfoNCE
from layerwise.objectives.pooled import NTXent

COLUMNS, FRAMES, WINDOWS = 3, 9, 4


@pytest.fixture
def objective() -> PositionsAndRenderings:
    torch.manual_seed(0)
    return PositionsAndRenderings(InfoNCE(5, 5, steps=2, negatives=3, shared=True), NTXent(5, 4, 0.5))


def drawn(objective: torch.nn.Module, parts: int = 1) -> list:
    return objective.draw(np.full(WINDOWS, FRAMES), FRAMES, COLUMNS, np.random.default_rng(0), parts)


def test_a_recurrent_stage_predicts_its_inputs_and_compares_its_contexts() -> None:
    torch.manual_seed(0)
    objective = PositionsAndRenderings(InfoNCE(5, 6, steps=2, negatives=3), NTXent(6, 4, 0.5))
    inputs, contexts = torch.randn(WINDOWS * FRAMES, 5), torch.randn(WINDOWS * FRAMES, 6)
    (draw,) = drawn(objective)
    at = torch.from_numpy(draw.positions.rows)
    expected = objective.positions(inputs[at], contexts[at], draw.positions, 2**20).loss
    expected = expected + objective.renderings(contexts, contexts, draw.renderings, 0).loss
    assert objective(inputs, contexts, draw, 2**20).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_its_loss_is_the_sum_of_both(objective: PositionsAndRenderings) -> None:
    frames = torch.randn(WINDOWS * FRAMES, 5)
    (draw,) = drawn(objective)
    (of_positions,), (of_renderings,) = drawn(objective.positions), drawn(objective.renderings)
    at = frames[torch.from_numpy(of_positions.rows)]
    expected = objective.positions(at, at, of_positions, 2**20).loss
    expected = expected + objective.renderings(frames, frames, of_renderings, 0).loss
    assert float(objective(frames, frames, draw, 2**20).loss) == pytest.approx(float(expected), rel=1e-6)


def test_the_losses_and_gradients_of_the_parts_add_up_to_the_batch(objective: PositionsAndRenderings) -> None:
    frames = torch.randn(WINDOWS * FRAMES, 5, requires_grad=True)
    gradients = []
    for parts in (1, 3):
        for draw in drawn(objective, parts):
            rows = torch.from_numpy(draw.rows)
            objective(frames[rows], frames[rows], draw, 2**20).loss.backward()
        gradients.append(frames.grad)
        frames.grad = None
    assert torch.allclose(*gradients, atol=1e-6)


def test_pictures_without_two_cells_apart_are_compared_by_their_renderings_alone() -> None:
    torch.manual_seed(0)
    objective = PositionsAndRenderings(InfoNCE(5, 5, steps=2, skip=3, negatives=3, shared=True), NTXent(5, 4, 0.5))
    frames = torch.randn(WINDOWS * FRAMES, 5)
    (draw,) = drawn(objective)
    renderings = objective.renderings(frames, frames, draw.renderings, 0).loss
    assert float(objective(frames, frames, draw, 2**20).loss) == pytest.approx(float(renderings), rel=1e-6)

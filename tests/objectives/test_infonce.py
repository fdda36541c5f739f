"""InfoNCE against a plain version that follows the formula with loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.objectives.infonce import Draw, InfoNCE


def plain_infonce(objective: InfoNCE, targets: torch.Tensor, contexts: torch.Tensor, draw: Draw) -> tuple[float, float]:
    """Mean over steps of the mean over pairs of -log softmax, one pair at a time, in float64."""
    z, c = targets.flatten(0, 1).double(), contexts.flatten(0, 1).double()
    losses, hits = [], []
    for step, (offset, predictor) in enumerate(zip(draw.offsets, objective.predictors, strict=True)):
        of_step, hits_of_step = [], []
        for sample in range(draw.anchors.shape[0]):
            for target in range(draw.anchors.shape[1]):
                if draw.weights[sample, target, step] == 0:
                    continue
                context = c[draw.anchors[sample, target - offset]]
                prediction = predictor.weight.double() @ context
                positive = z[draw.anchors[sample, target]] @ prediction
                negatives = torch.stack([z[number] @ prediction for number in draw.negatives[sample, target]])
                of_step.append(-(positive - torch.logsumexp(torch.cat([positive[None], negatives]), 0)))
                hits_of_step.append(float(positive > negatives.max()))
        if of_step:
            losses.append(torch.stack(of_step).mean())
            hits.append(np.mean(hits_of_step))
    return torch.stack(losses).mean().item(), float(np.mean(hits))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 20), min_size=1, max_size=4),
    columns=st.integers(1, 4),
    steps=st.integers(1, 4),
    skip=st.integers(0, 1),
    anchors=st.integers(3, 12),
    seed=st.integers(0, 10_000),
)
def test_loss_and_accuracy_equal_the_plain_version(
    lengths: list[int], columns: int, steps: int, skip: int, anchors: int, seed: int
) -> None:
    torch.manual_seed(seed)
    frames = max(lengths) * columns
    objective = InfoNCE(5, 7, steps, skip, negatives=3, anchors=anchors)
    targets, contexts = torch.randn(len(lengths), frames, 5), torch.randn(len(lengths), frames, 7)
    draw = objective.draw(np.array(lengths) * columns, frames, columns, np.random.default_rng(seed))
    loss, accuracy = plain_infonce(objective, targets, contexts, draw)
    score = objective(targets, contexts, draw)
    assert score.loss.item() == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert score.accuracy.item() == pytest.approx(accuracy, abs=1e-6)


def test_gradients_equal_those_of_the_formula() -> None:
    torch.manual_seed(0)
    objective = InfoNCE(4, 4, steps=2, negatives=3, anchors=6).double()
    draw = objective.draw(np.array([6, 5]), 6, 1, np.random.default_rng(0))
    frames = torch.randn(2, 6, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: objective(x, x, draw).loss, frames, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(2, 30), min_size=1, max_size=5),
    columns=st.integers(1, 3),
    anchors=st.integers(2, 16),
    seed=st.integers(0, 10_000),
)
def test_a_draw_scores_real_frames_only_and_never_contrasts_a_target_with_itself(
    rows: list[int], columns: int, anchors: int, seed: int
) -> None:
    lengths = np.array(rows) * columns
    frames = int(lengths.max())
    objective = InfoNCE(2, 2, steps=3, negatives=4, anchors=anchors)
    draw = objective.draw(lengths, frames, columns, np.random.default_rng(seed))
    scored = draw.weights.sum(2) > 0
    real = {b * frames + t for b, length in enumerate(lengths) for t in range(length)}
    assert set(draw.anchors[scored].tolist()) <= real
    assert set(draw.negatives[scored].ravel().tolist()) <= real
    assert (draw.negatives[scored] != draw.anchors[scored][:, None]).all()
    assert draw.weights.sum() == pytest.approx(1, abs=1e-4)


def test_negatives_come_from_the_whole_batch_and_all_of_its_frames() -> None:
    objective = InfoNCE(2, 2, steps=1, negatives=10, anchors=8)
    lengths = np.array([8, 3, 5])
    seen: set[int] = set()
    for seed in range(30):
        seen |= set(objective.draw(lengths, 8, 1, np.random.default_rng(seed)).negatives.ravel().tolist())
    assert seen == {b * 8 + t for b, length in enumerate(lengths) for t in range(length)}


def test_a_window_slides_over_the_whole_sample() -> None:
    objective = InfoNCE(2, 2, steps=1, negatives=1, anchors=4)
    firsts = {
        int(objective.draw(np.array([10]), 10, 1, np.random.default_rng(seed)).anchors[0, 0]) for seed in range(100)
    }
    assert firsts == set(range(7))


def test_a_predictable_sequence_is_learned() -> None:
    torch.manual_seed(0)
    frames = torch.nn.functional.normalize(torch.randn(4, 40, 16), dim=2)
    frames[:, 1::2] = frames[:, ::2]  # every odd frame repeats the one before it
    objective = InfoNCE(16, 16, steps=1, negatives=8, anchors=40)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    lengths = np.full(4, 40)
    for step in range(60):
        score = objective(frames, frames, objective.draw(lengths, 40, 1, np.random.default_rng(step)))
        optimizer.zero_grad()
        score.loss.backward()
        optimizer.step()
    assert score.accuracy.item() > 0.4  # half of the pairs are predictable, chance is 1 in 9

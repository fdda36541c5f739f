"""InfoNCE against a plain version that follows the formula with loops, in float64 and under plain autograd."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.memory.host import HostMemory
from layerwise.memory.meter import Meter
from layerwise.objectives.contrastive import Draw, InfoNCE
from layerwise.objectives.protocol import Group

CPU = torch.device("cpu")
WIDE = 2**30
"""Bytes of room in which every case here is one slice."""


@dataclass(frozen=True)
class Case:
    """A batch of padded samples, an objective, and what is drawn for it in some number of parts."""

    objective: InfoNCE
    lengths: np.ndarray
    frames: int
    columns: int
    targets: torch.Tensor
    """float64 [B * L, C], frames of the padded batch."""
    contexts: torch.Tensor
    """float64 [B * L, D]; the targets themselves where they are shared."""
    draws: list[Draw]

    def in_parts(self, parts: int) -> "Case":
        """The same batch and the same random numbers in another number of parts."""
        return Case(
            self.objective, self.lengths, self.frames, self.columns, self.targets, self.contexts, self._drawn(parts)
        )

    def _drawn(self, parts: int) -> list[Draw]:
        rng = np.random.default_rng(17)
        return self.objective.draw(self.lengths, self.frames, self.columns, rng, parts)


def make_case(
    lengths: list[int],
    columns: int = 1,
    steps: int = 3,
    skip: int = 0,
    negatives: int = 3,
    anchors: int = 12,
    shared: bool = False,
    parts: int = 1,
    seed: int = 0,
    channels: int = 5,
) -> Case:
    """lengths: rows of each sample. What lies behind them is noise too: a draw must never reach for it."""
    torch.manual_seed(seed)
    frames = max(lengths) * columns
    targets = torch.randn(len(lengths) * frames, channels, dtype=torch.double)
    contexts = targets if shared else torch.randn(len(lengths) * frames, channels + 2, dtype=torch.double)
    objective = InfoNCE(channels, contexts.shape[1], steps, skip, negatives, anchors)
    return Case(objective, np.array(lengths) * columns, frames, columns, targets, contexts, []).in_parts(
        min(parts, len(lengths))
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Ragged batches of sequences and grids."""
    return make_case(
        draw(st.lists(st.integers(3, 20), min_size=1, max_size=4)),
        columns=draw(st.integers(1, 4)),
        steps=draw(st.integers(1, 4)),
        skip=draw(st.integers(0, 1)),
        anchors=draw(st.integers(3, 12)),
        shared=draw(st.booleans()),
        parts=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 10_000)),
    )


@dataclass(frozen=True)
class Outcome:
    """float64 throughout; gradients of frames that nothing scores are zero."""

    loss: torch.Tensor
    accuracy: float
    targets: torch.Tensor
    contexts: torch.Tensor
    predictors: torch.Tensor


def plain_outcome(case: Case) -> Outcome:
    """Mean over steps of the mean over pairs of -log softmax, one pair at a time; pairs are found by frame numbers alone.

    Of the draws it takes which frames the windows hold and which negatives each target has, nothing else.
    """
    z = case.targets.clone().requires_grad_()
    c = z if case.contexts is case.targets else case.contexts.clone().requires_grad_()
    predictors = case.objective.predictors.detach().double().requires_grad_()
    losses: list[list[torch.Tensor]] = [[] for _ in predictors]
    hits: list[list[float]] = [[] for _ in predictors]
    for draw in case.draws:
        of_steps = draw.rows[draw.candidates].tolist()
        window = [*draw.rows[draw.contexts].tolist(), *(target for target, *_ in of_steps[0])]
        for step, predictor in enumerate(predictors):
            for target, *negatives in of_steps[step if len(of_steps) > 1 else 0]:
                sample, position = divmod(target, case.frames)
                if position >= case.lengths[sample]:
                    continue
                first = min(frame for frame in window if frame // case.frames == sample)
                context = target - (step + 1 + case.objective.skip) * case.columns
                if context < first:
                    continue
                prediction = predictor @ c[context]
                logits = torch.stack([z[frame] @ prediction for frame in [target, *negatives]])
                losses[step].append(torch.logsumexp(logits, 0) - logits[0])
                hits[step].append(float(logits[0] > logits[1:].max()))
    loss = torch.stack([torch.stack(of_step).mean() for of_step in losses if of_step]).mean()
    loss.backward()
    of_contexts = z.grad if c is z else c.grad
    return Outcome(loss.detach(), float(np.mean([np.mean(h) for h in hits if h])), z.grad, of_contexts, predictors.grad)


def lean_outcome(case: Case, room: int = WIDE, dtype: torch.dtype = torch.float32, at_once: int = 0) -> Outcome:
    """What the objective gives, over all parts, with gradients put back where their rows lie in the batch.

    at_once: predictors that are there at a time; 0: all, in one call.
    """
    objective = case.objective.to(dtype)
    objective.zero_grad()
    loss, accuracy = torch.zeros((), dtype=torch.double), 0.0
    shared = case.contexts is case.targets
    of_targets = torch.zeros_like(case.targets)
    of_contexts = of_targets if shared else torch.zeros_like(case.contexts)
    for draw in case.draws:
        z = case.targets[draw.rows].to(dtype).requires_grad_()
        c = z if shared else case.contexts[draw.rows].to(dtype).requires_grad_()
        if at_once:
            groups = HostMemory().visits(objective.predictors, at_once, CPU, graded=True)
            score = objective.streamed(z, c, draw, room, groups)
        else:
            score = objective(z, c, draw, room)
        score.loss.backward()
        loss += score.loss.detach()
        accuracy += score.accuracy.item()
        of_targets[draw.rows] += z.grad
        if not shared:
            of_contexts[draw.rows] += c.grad
    assert objective.predictors.grad is not None
    return Outcome(loss, accuracy, of_targets, of_contexts, objective.predictors.grad.double())


def assert_close(found: Outcome, expected: Outcome, relative: float) -> None:
    """The difference of each tensor, against its length. The loss is a mean of logarithms near 1: absolute there."""
    assert abs(found.loss - expected.loss) <= relative * max(abs(expected.loss), 1)
    assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-6)
    for name in ("targets", "contexts", "predictors"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one - other).norm() <= relative * other.norm() + 1e-12, name


@settings(max_examples=40, deadline=None)
@given(cases())
def test_loss_accuracy_and_gradients_equal_the_plain_version(case: Case) -> None:
    assert_close(lean_outcome(case), plain_outcome(case), relative=1e-5)


@settings(max_examples=15, deadline=None)
@given(cases())
def test_in_double_they_are_the_same_but_for_rounding(case: Case) -> None:
    expected = plain_outcome(case)
    found = lean_outcome(case, dtype=torch.double)
    # Weights are float32, 6e-8; all else is not.
    assert_close(found, expected, relative=2e-7)


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([0, 1, 500, 3000]))
def test_the_room_changes_nothing(case: Case, room: int) -> None:
    assert_close(lean_outcome(case, room), lean_outcome(case, WIDE), relative=1e-6)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_losses_and_gradients_of_parts_add_up_to_those_of_one(case: Case) -> None:
    whole = case.in_parts(1)
    for parts in range(2, len(case.lengths) + 1):
        assert_close(lean_outcome(case.in_parts(parts)), lean_outcome(whole), relative=1e-6)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 4), st.sampled_from([1, WIDE]))
def test_predictors_that_come_some_at_a_time_give_what_all_give(case: Case, at_once: int, room: int) -> None:
    found = lean_outcome(case, room, torch.double, at_once)
    assert_close(found, lean_outcome(case, WIDE, torch.double), relative=1e-10)


@pytest.mark.parametrize("graded", [False, True])
def test_a_group_of_predictors_is_let_go_of_before_the_next_comes(graded: bool) -> None:
    case = make_case([20] * 3, steps=4, channels=32, shared=True)
    (draw,) = case.draws
    held: list[weakref.ref] = []

    def watched() -> Iterator[Group]:
        for group in HostMemory().visits(case.objective.predictors, 1, CPU, graded):
            assert not any(reference() is not None for reference in held)
            held.extend(weakref.ref(tensor) for tensor in group[1:] if tensor is not None)
            yield group
            del group

    z = case.targets[draw.rows].float().requires_grad_(graded)
    with torch.set_grad_enabled(graded):
        case.objective.streamed(z, z, draw, WIDE, watched())
    assert len(held) == 4 * (1 + graded)
    assert (case.objective.predictors.grad is not None) == graded


@settings(max_examples=40, deadline=None)
@given(cases())
def test_what_is_drawn_does_not_depend_on_the_parts(case: Case) -> None:
    def drawn(draws: list[Draw]) -> set[tuple[int, ...]]:
        of_steps = [step for draw in draws for step in enumerate(draw.rows[draw.candidates].tolist())]
        return {(step, *scored) for step, of_step in of_steps for scored in of_step}

    assert drawn(case.in_parts(len(case.lengths)).draws) == drawn(case.in_parts(1).draws)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("columns", [1, 3])
def test_gradients_are_the_slopes_of_the_loss(columns: int, shared: bool) -> None:
    case = make_case([6, 5], columns=columns, steps=2, anchors=6, shared=shared)
    found = lean_outcome(case, dtype=torch.double)
    generator = torch.Generator().manual_seed(1)
    for name in ("targets", "predictors") if shared else ("targets", "contexts", "predictors"):
        value = case.objective.predictors.data if name == "predictors" else getattr(case, name)
        direction = torch.randn(value.shape, dtype=torch.double, generator=generator)
        losses = []
        for length in (1e-5, -2e-5):
            value += length * direction
            losses.append(lean_outcome(case, dtype=torch.double).loss)
        value += 1e-5 * direction
        slope = (losses[0] - losses[1]) / 2e-5
        assert (getattr(found, name) * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_without_gradients_none_are_made_and_the_score_is_the_same() -> None:
    case = make_case([20] * 3, channels=64, shared=True)
    (draw,) = case.draws
    with Meter(CPU) as meter:
        frames = case.targets[draw.rows].float()
        predictors = case.objective.predictors.data = case.objective.predictors.detach().clone()
        scored = case.objective(frames.clone().requires_grad_(), frames, draw, WIDE)
        with_gradients, _ = meter.peak, meter.reset_peak()
        with torch.no_grad():
            score = case.objective(frames, frames, draw, WIDE)
    assert scored.loss.requires_grad
    assert not score.loss.requires_grad
    assert not score.accuracy.requires_grad
    assert case.objective.predictors.grad is None
    assert (score.loss - scored.loss).abs() < 1e-6
    assert score.accuracy == scored.accuracy
    held = meter.live
    del scored
    assert held - meter.live >= frames.nbytes + predictors.nbytes  # the gradients that the first one made
    assert meter.peak < with_gradients + (held - meter.live)


def test_the_accuracy_carries_no_gradient() -> None:
    case = make_case([9, 9])
    (draw,) = case.draws
    score = case.objective(case.targets[draw.rows].float().requires_grad_(), case.contexts[draw.rows], draw, WIDE)
    assert not score.accuracy.requires_grad


def test_a_gradient_from_above_scales_all_of_them() -> None:
    case = make_case([9, 7])
    (draw,) = case.draws
    z, c = case.targets[draw.rows].float().requires_grad_(), case.contexts[draw.rows].float().requires_grad_()
    of_one = torch.autograd.grad(case.objective(z, c, draw, WIDE).loss, (z, c, case.objective.predictors))
    of_three = torch.autograd.grad(3 * case.objective(z, c, draw, WIDE).loss, (z, c, case.objective.predictors))
    for one, three in zip(of_one, of_three, strict=True):
        torch.testing.assert_close(3 * one, three)


def bytes_beside_inputs_and_gradients(case: Case, room: int) -> int:
    """Highest point of the loss and its gradients, above the rows, the predictors and as many bytes of gradients."""
    (draw,) = case.draws
    with Meter(CPU) as meter:
        # A view of a tensor from outside would count as new.
        frames = case.targets[draw.rows].float().requires_grad_()
        case.objective.predictors.data = case.objective.predictors.detach().clone()
        inputs = frames.nbytes + case.objective.predictors.nbytes
        before = meter.live
        meter.reset_peak()
        score = case.objective(frames, frames, draw, room)
        assert before + inputs <= meter.live <= before + inputs + 16  # loss and accuracy
        score.loss.backward()
        return meter.peak - before - inputs


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("negatives", [10, 80])
@pytest.mark.parametrize("kilobytes", [1, 64, 256, 1024])
def test_beside_inputs_and_gradients_it_holds_no_more_than_its_room_and_a_little(
    columns: int, negatives: int, kilobytes: int
) -> None:
    channels, steps, rows, room = 256, 6, 64 // columns, kilobytes * 1024
    sizes = {"steps": steps, "negatives": negatives, "channels": channels}
    case = make_case([80] * 4, columns=columns, anchors=rows, shared=True, **sizes)
    anchors = len(case.draws[0].contexts)
    one_target = 4 * channels * (1 + negatives + 2 * steps)
    contexts = 2 * 4 * anchors * channels  # of the windows, and their gradients: whatever the negatives
    numbers = 3 * 8 * anchors * (1 + negatives) + 4 * anchors * steps  # where the candidates lie, and the weights
    logits = 6 * 4 * max(room // one_target, 1) * (1 + negatives) * steps
    held = bytes_beside_inputs_and_gradients(case, room)
    assert held <= max(room, one_target) + contexts + numbers + logits
    if kilobytes < 1024:
        assert held < 4 * anchors * (1 + negatives) * channels  # all candidates at once


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(2, 30), min_size=1, max_size=5),
    columns=st.integers(1, 3),
    anchors=st.integers(2, 16),
    parts=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_a_draw_scores_real_frames_only_and_never_contrasts_a_target_with_itself(
    rows: list[int], columns: int, anchors: int, parts: int, seed: int
) -> None:
    lengths = np.array(rows) * columns
    frames = int(lengths.max())
    objective = InfoNCE(2, 2, steps=3, negatives=4, anchors=anchors)
    draws = objective.draw(lengths, frames, columns, np.random.default_rng(seed), min(parts, len(rows)))
    real = {b * frames + t for b, length in enumerate(lengths) for t in range(length)}
    for draw in draws:
        assert (np.diff(draw.rows) > 0).all()  # sorted, each once
        assert set(draw.candidates.ravel().tolist()) | set(draw.contexts.tolist()) <= set(range(len(draw.rows)))
        for step in range(objective.steps):
            target = np.flatnonzero(draw.weights[:, step])
            candidates = draw.candidates[step if columns > 1 else 0, target]
            assert set(draw.rows[candidates].ravel().tolist()) <= real
            assert (candidates[:, 1:] != candidates[:, :1]).all()
            contexts = draw.rows[draw.contexts[target + step * draw.apart]]
            assert (draw.rows[candidates[:, 0]] - contexts == (step + 1) * columns).all()
            assert set(contexts.tolist()) <= real
    assert sum(draw.weights.sum() for draw in draws) == pytest.approx(1, abs=1e-4)


def test_negatives_come_from_the_whole_batch_and_all_of_its_frames() -> None:
    objective = InfoNCE(2, 2, steps=1, negatives=10, anchors=8)
    lengths = np.array([8, 3, 5])
    real = {b * 8 + t for b, length in enumerate(lengths) for t in range(length)}
    for parts in (1, 3):
        seen: list[set[int]] = [set() for _ in range(parts)]
        for seed in range(60):
            for found, draw in zip(
                seen, objective.draw(lengths, 8, 1, np.random.default_rng(seed), parts), strict=True
            ):
                scored = draw.weights.sum(1) > 0
                found |= set(draw.rows[draw.candidates[0, scored, 1:]].ravel().tolist())
        assert seen == [real] * parts


def test_in_pictures_negatives_of_a_step_come_evenly_from_its_targets_in_the_whole_batch() -> None:
    objective = InfoNCE(2, 2, steps=3, skip=1, negatives=40, anchors=16)
    lengths, frames, columns = np.array([5, 4, 2, 5]) * 2, 10, 2  # samples of 5, 4, 2 and 5 rows
    numbers = [[b * frames + t for b in range(4) for t in range((step + 2) * columns, lengths[b])] for step in range(3)]
    counts = [dict.fromkeys(of_step, 0) for of_step in numbers]
    for seed in range(40):
        (draw,) = objective.draw(lengths, frames, columns, np.random.default_rng(seed))
        for step, of_step in enumerate(counts):
            target = np.flatnonzero(draw.weights[:, step])
            assert sorted(draw.rows[draw.candidates[step, target, 0]].tolist()) == numbers[step]
            for negative in draw.rows[draw.candidates[step, target, 1:]].ravel().tolist():
                of_step[negative] += 1  # a KeyError here is a negative that is no target of the step
    for of_step in counts:
        times = np.array(list(of_step.values()))
        assert abs(times - times.mean()).max() < 5 * times.mean() ** 0.5


def test_a_window_slides_over_the_whole_sample() -> None:
    objective = InfoNCE(2, 2, steps=1, negatives=1, anchors=4)
    draws = [objective.draw(np.array([10]), 10, 1, np.random.default_rng(seed))[0] for seed in range(100)]
    assert {int(draw.rows[draw.contexts[-1]]) for draw in draws} == set(range(7))


def test_only_the_rows_that_are_scored_are_asked_for() -> None:
    objective = InfoNCE(2, 2, steps=1, negatives=2, anchors=4)
    (draw,) = objective.draw(np.full(3, 1000), 1000, 1, np.random.default_rng(0))
    assert len(draw.rows) <= 3 * 4 * (1 + 2)


def test_a_predictable_sequence_is_learned() -> None:
    torch.manual_seed(0)
    frames = torch.nn.functional.normalize(torch.randn(4, 40, 16), dim=2)
    frames[:, 1::2] = frames[:, ::2]  # every odd frame repeats the one before it
    objective = InfoNCE(16, 16, steps=1, negatives=8, anchors=40)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    lengths = np.full(4, 40)
    for step in range(60):
        (draw,) = objective.draw(lengths, 40, 1, np.random.default_rng(step))
        rows = frames.flatten(0, 1)[draw.rows]
        score = objective(rows, rows, draw, WIDE)
        optimizer.zero_grad()
        score.loss.backward()
        optimizer.step()
    assert score.accuracy.item() > 0.4  # half of the pairs are predictable, chance is 1 in 9

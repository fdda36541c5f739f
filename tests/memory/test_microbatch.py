"""Loss and gradients of a batch do not depend on how it is sliced, where its representations wait, in how many parts the
loss is worked out, or whether layers run again."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import noop_context_fn

from layerwise.config import NetOptions
from layerwise.memory import microbatch
from layerwise.memory.host import HostMemory
from layerwise.memory.meter import Meter
from layerwise.nets.layer import Layer
from layerwise.nets.module import Module
from layerwise.nets.speech import speech_network
from layerwise.nets.vision import vision_network
from layerwise.objectives.contrastive import Draw, InfoNCE

CPU = torch.device("cpu")
ROOM = 2**20
SPEECH = NetOptions(width=6, context=5, kernels=(4, 4), strides=(2, 2), paddings=(1, 1))
VISION = NetOptions(name="vision", width=2, blocks=(1, 1))


class Dropping(Layer):
    """A linear layer with dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(channels, channels), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear(x))


MODULES: dict[str, tuple[Callable[[], Module], tuple[int, ...], int]] = {
    "convolution": (lambda: speech_network(SPEECH).build(range(1), 0, "cpu"), (1,), 1),
    "two convolutions": (lambda: speech_network(SPEECH).build(range(2), 0, "cpu"), (1,), 1),
    "convolutions and a GRU": (lambda: speech_network(SPEECH).build(range(3), 0, "cpu"), (1,), 1),
    # Its targets are its inputs, which no gradient reaches.
    "a GRU alone": (lambda: speech_network(SPEECH).build(range(2, 3), 0, "cpu"), (6,), 1),
    "vision blocks": (lambda: vision_network(VISION, 1).build(range(2), 0, "cpu"), (1, 4, 4), 3),
}
"""Name to how it is built, the shape of its input frames, and how many of them stand side by side."""


@dataclass(frozen=True)
class Work:
    """A module, an objective, and a ragged batch."""

    module: Module
    objective: InfoNCE
    x: torch.Tensor
    lengths: np.ndarray
    columns: int

    @property
    def out_lengths(self) -> np.ndarray:
        return self.module.out_length(self.lengths)

    @property
    def out_frames(self) -> int:
        return int(self.module.out_length(self.x.shape[1]))

    def draws(self, parts: int = 0) -> list[Draw]:
        rng = np.random.default_rng(5)
        return self.objective.draw(self.out_lengths, self.out_frames, self.columns, rng, max(parts, 1))

    def batch(
        self,
        micro_batch: int,
        host: HostMemory | None = None,
        recompute: bool = False,
        seed: int | None = None,
    ) -> microbatch.SlicedBatch:
        """host: where representations wait; None: on the device. seed: of what the module draws; None: nothing."""

        def encode(samples: slice, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
            with seeded(seed, samples.start):
                return self.module.representations(
                    self.x[samples],
                    self.lengths[samples],
                    torch.as_tensor(rows),
                    noop_context_fn if recompute else None,
                )

        return microbatch.SlicedBatch(encode, len(self.x), self.out_frames, micro_batch, CPU, host)

    def loss(self, representations: tuple[torch.Tensor, ...], part: Draw) -> microbatch.Total:
        score = self.objective(representations[0], representations[-1], part, ROOM)
        return microbatch.Total(score.loss, score.accuracy)

    def gradients(self) -> dict[str, torch.Tensor]:
        """And the parameters are left without any."""
        found = {}
        for part in (self.module, self.objective):
            for name, parameter in part.named_parameters():
                assert parameter.grad is not None, name
                found[name], parameter.grad = parameter.grad, None
        return found


@contextmanager
def seeded(seed: int | None, first_sample: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(1000 * seed + first_sample)
        yield


def make_work(kind: str, rows: list[int], dtype: torch.dtype = torch.double, seed: int = 0) -> Work:
    """rows: of each sample's input; what lies behind them is zero, as in a batch of windows."""
    build, frame_shape, columns = MODULES[kind]
    module = build().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    lengths = np.array(rows) * columns
    x = torch.randn(len(rows), int(lengths.max()), *frame_shape, dtype=dtype, generator=generator)
    for sample, length in enumerate(lengths):
        x[sample, length:] = 0
    with torch.no_grad():
        targets, outputs = module(x, lengths)
    channels = (targets.shape[2], outputs.shape[2])
    torch.manual_seed(seed)
    return Work(module, InfoNCE(*channels, steps=2, negatives=3, anchors=8).to(dtype), x, lengths, columns)


Result = tuple[float, float, dict[str, torch.Tensor]]


def plain(work: Work) -> Result:
    """The whole batch through `forward`, as anyone would train it."""
    (draw,) = work.draws()
    targets, outputs = work.module(work.x, work.lengths)
    z, c = (
        (t.flatten(3).mean(3) if t.dim() > 3 else t).flatten(0, 1)[torch.as_tensor(draw.rows)]
        for t in (targets, outputs)
    )
    score = work.objective(z, z if targets is outputs else c, draw, ROOM)
    score.loss.backward()
    return score.loss.item(), score.accuracy.item(), work.gradients()


def sliced(work: Work, micro_batch: int, parts: int, recompute: bool) -> Result:
    """parts: of the loss, while the representations wait on the host; 0: they stay on the device."""
    batch, draws = work.batch(micro_batch, HostMemory() if parts else None, recompute), work.draws(parts)
    pending = run_forward(work, batch, draws)
    microbatch.run_back(pending, batch, HostMemory())
    return pending.score.loss.item(), pending.score.accuracy.item(), work.gradients()


def run_forward(work: Work, batch: microbatch.SlicedBatch, draws: list[Draw], scale: float = 1.0) -> microbatch.Pending:
    """The score of a batch, and its gradients as far as the representations."""
    representations = microbatch.encode(batch, microbatch.all_rows(draws), with_graph=True)
    return microbatch.loss_gradients(batch, representations, [work.loss], draws, scale)


def assert_same(found: Result, expected: Result, relative: float) -> None:
    """The difference of each parameter's gradient, against its length."""
    assert found[0] == pytest.approx(expected[0], rel=relative)
    assert found[1] == pytest.approx(expected[1], abs=1e-6)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert (found[2][name] - gradient).norm() <= relative * gradient.norm() + 1e-15, name


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(MODULES)),
    rows=st.lists(st.integers(16, 40), min_size=1, max_size=6),
    micro_batch=st.integers(1, 6),
    parts=st.integers(0, 6),
    recompute=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_slicing_changes_loss_accuracy_or_gradients(
    kind: str, rows: list[int], micro_batch: int, parts: int, recompute: bool, seed: int
) -> None:
    # In double, where rounding cannot flip a ReLU.
    work = make_work(kind, rows, seed=seed)
    found = sliced(work, micro_batch, min(parts, len(rows)), recompute)
    assert_same(found, plain(work), relative=1e-10)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("micro_batch", "parts"), [(5, 0), (2, 0), (5, 1), (2, 1), (5, 5), (1, 5)])
def test_in_float32_they_agree_to_rounding(kind: str, micro_batch: int, parts: int) -> None:
    work = make_work(kind, [40, 17, 33, 21, 40], torch.float32)
    loss, accuracy, gradients = plain(work)
    for recompute in (False, True):
        found = sliced(work, micro_batch, parts, recompute)
        assert found[:2] == pytest.approx((loss, accuracy), rel=1e-5)
        # All parameters together: a bias is a sum in which nearly everything cancels.
        assert relative_difference(found[2], gradients) < 1e-5


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("micro_batch", "parts"), [(4, 0), (2, 0), (4, 1), (2, 2), (1, 4)])
def test_a_score_without_gradients_is_the_same(kind: str, micro_batch: int, parts: int) -> None:
    work = make_work(kind, [40, 17, 33, 21])
    batch, draws = work.batch(micro_batch, HostMemory() if parts else None), work.draws(parts)
    representations = microbatch.encode(batch, microbatch.all_rows(draws), with_graph=False)
    found = microbatch.score(batch, representations, [work.loss], draws)
    loss, accuracy, _ = plain(work)
    assert not found.loss.requires_grad
    assert found.loss.item() == pytest.approx(loss, rel=1e-6)
    assert found.accuracy.item() == pytest.approx(accuracy, abs=1e-6)


def test_gradients_are_added_to_those_that_are_there() -> None:
    work = make_work("convolution", [20, 30])
    expected = sliced(work, 1, 0, False)[2]
    for part in (work.module, work.objective):
        for parameter in part.parameters():
            parameter.grad = torch.ones_like(parameter)
    for name, gradient in sliced(work, 1, 0, False)[2].items():
        torch.testing.assert_close(gradient, expected[name] + 1)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_the_scale_acts_on_the_module_and_not_on_the_predictors(micro_batch: int, parts: int) -> None:
    work = make_work("two convolutions", [20, 30, 25, 30])
    plain_gradients = plain(work)[2]
    host = HostMemory()
    batch = work.batch(micro_batch, host if parts else None)
    microbatch.run_back(run_forward(work, batch, work.draws(parts), 1024.0), batch, host)
    for name, gradient in work.gradients().items():
        factor = 1 if name == "predictors" else 1024
        torch.testing.assert_close(gradient, factor * plain_gradients[name])


@dataclass(frozen=True)
class Everything:
    """A part that scores all rows."""

    rows: np.ndarray


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("host", [None, HostMemory()], ids=["on the device", "on the host"])
@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_the_scale_saves_gradients_that_half_precision_cannot_hold(
    micro_batch: int, host: HostMemory | None, size: float
) -> None:
    # The representations of a step in float16, and a loss in float32 that hardly depends on each of them.
    linear = nn.Linear(6, 6).half()
    x = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(0)).half()
    slopes = size * (1 + torch.rand(40, 6, generator=torch.Generator().manual_seed(1)))

    def encode(samples: slice, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        return (linear(x[samples]).flatten(0, 1)[torch.as_tensor(rows)],)

    def loss(representations: tuple[torch.Tensor, ...], part: Everything) -> microbatch.Total:
        value = (representations[0].float() * slopes).sum()
        return microbatch.Total(value, value.detach())

    batch, part = microbatch.SlicedBatch(encode, 4, 10, micro_batch, CPU, host), Everything(np.arange(40))
    representations = microbatch.encode(batch, part.rows, with_graph=True)
    pending = microbatch.loss_gradients(batch, representations, [loss], [part], scale=2.0**16)
    expected = slopes * 2.0**16
    assert (pending.gradients[0].float() - expected).norm() < 1e-3 * expected.norm()


def dropping(samples: int) -> Work:
    """A batch for a module that draws random numbers; every layer has its own."""
    torch.manual_seed(1)
    module = Module({0: Dropping(6), 1: Dropping(6)}).double()
    x = torch.randn(samples, 20, 6, dtype=torch.double)
    objective = InfoNCE(6, 6, steps=2, negatives=4, anchors=12).double()
    return Work(module, objective, x, np.full(samples, 20), 1)


def in_one_graph(work: Work, micro_batch: int) -> Result:
    """The same slices with the same seeds, joined, and one backward pass through all of it."""
    (draw,) = work.draws()
    pieces = []
    for start in range(0, len(work.x), micro_batch):
        stop = min(start + micro_batch, len(work.x))
        with seeded(3, start):
            pieces.append(work.module(work.x[start:stop], work.lengths[start:stop])[1])
    frames = torch.cat(pieces).flatten(0, 1)[torch.as_tensor(draw.rows)]
    score = work.objective(frames, frames, draw, ROOM)
    score.loss.backward()
    return score.loss.item(), score.accuracy.item(), work.gradients()


def replayed(work: Work, micro_batch: int, parts: int, recompute: bool) -> Result:
    host = HostMemory()
    batch = work.batch(micro_batch, host if parts else None, recompute, seed=3)
    pending = run_forward(work, batch, work.draws(parts))
    torch.rand(7)  # whatever happens in between, the second forward pass repeats the first
    microbatch.run_back(pending, batch, host)
    return pending.score.loss.item(), pending.score.accuracy.item(), work.gradients()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("micro_batch", "parts"), [(1, 0), (2, 0), (3, 0), (6, 0), (6, 1), (2, 4), (1, 6)])
def test_with_dropout_the_replayed_pass_draws_what_the_first_one_drew(
    micro_batch: int, parts: int, recompute: bool
) -> None:
    work = dropping(samples=6)
    assert_same(replayed(work, micro_batch, parts, recompute), in_one_graph(work, micro_batch), relative=1e-10)


def test_other_random_numbers_in_the_replayed_pass_would_be_noticed() -> None:
    work = dropping(samples=6)
    pending = run_forward(work, work.batch(2, seed=3), work.draws())
    microbatch.run_back(pending, work.batch(2, seed=4), HostMemory())
    found = work.gradients()
    assert relative_difference(found, in_one_graph(work, 2)[2]) > 0.05


@pytest.mark.parametrize("kind", ["convolution", "convolutions and a GRU"])
def test_adding_up_gradients_of_slices_would_be_something_else(kind: str) -> None:
    # What people do for lack of memory: each slice is a batch of its own, with negatives from itself.
    work = make_work(kind, [40] * 6)
    accumulated: dict[str, torch.Tensor] = {}
    for start in range(0, 6, 2):
        part = Work(work.module, work.objective, work.x[start : start + 2], work.lengths[start : start + 2], 1)
        for name, gradient in plain(part)[2].items():
            accumulated[name] = accumulated.get(name, 0) + gradient / 3
    expected = plain(work)[2]
    assert relative_difference(accumulated, expected) > 0.05
    assert relative_difference(sliced(work, 2, 0, False)[2], expected) < 1e-10


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    difference = sum((found[name] - gradient).square().sum() for name, gradient in expected.items())
    return float((difference / sum(gradient.square().sum() for gradient in expected.values())).sqrt())


def test_smaller_slices_representations_on_the_host_and_more_parts_hold_less() -> None:
    work = make_work("two convolutions", [400] * 8, torch.float32)
    peaks = []
    for micro_batch, parts in [(8, 0), (4, 0), (2, 0), (1, 0), (1, 1), (1, 4), (1, 8)]:
        with Meter(CPU) as meter:
            sliced(work, micro_batch, parts, False)
        peaks.append(meter.peak)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0] / 3


@pytest.mark.parametrize("parts", [1, 3])
def test_representations_that_wait_on_the_host_leave_nothing_on_the_device(parts: int) -> None:
    work = make_work("convolutions and a GRU", [40, 17, 33, 21], torch.float32)
    batch, draws = work.batch(2, HostMemory()), work.draws(parts)
    with Meter(CPU) as meter:
        run_forward(work, batch, draws)
        work.objective.zero_grad()
        held = meter.live  # weights from outside, which count from their first sight
        representations = microbatch.encode(batch, microbatch.all_rows(draws), with_graph=True)
        assert meter.live == held
        pending = microbatch.loss_gradients(batch, representations, [work.loss], draws)
        assert meter.live == held + work.objective.predictors.grad.nbytes + pending.score.loss.nbytes + 4
    assert pending.graph is None


def test_every_loss_adds_to_the_score_and_the_gradients_and_is_let_go_of_before_the_next() -> None:
    work, alive = make_work("convolution", [40, 17, 33, 21]), []
    expected = sliced(work, 2, 0, False)

    class Third:
        """A third of the loss."""

        def __call__(self, representations: tuple[torch.Tensor, ...], part: Draw) -> microbatch.Total:
            whole = work.loss(representations, part)
            return microbatch.Total(whole.loss / 3, whole.accuracy / 3)

    def thirds() -> Iterator[microbatch.Loss]:
        for _ in range(3):
            assert not any(third() for third in alive)
            third = Third()
            alive.append(weakref.ref(third))
            yield third
            del third

    batch, draws = work.batch(2, HostMemory()), work.draws(2)
    representations = microbatch.encode(batch, microbatch.all_rows(draws), with_graph=True)
    score = microbatch.score(batch, representations, thirds(), draws)
    pending = microbatch.loss_gradients(batch, representations, thirds(), draws)
    microbatch.run_back(pending, batch, HostMemory())
    assert len(alive) == 6
    assert_same((pending.score.loss.item(), pending.score.accuracy.item(), work.gradients()), expected, relative=1e-6)
    assert score.loss.item() == pytest.approx(expected[0], rel=1e-10)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_gradients_that_were_moved_to_the_host_run_back_alike(micro_batch: int) -> None:
    work, host = make_work("vision blocks", [24, 17, 20, 16]), HostMemory()
    batch = work.batch(micro_batch)
    pending = run_forward(work, batch, work.draws())
    pending.move_to(host)
    microbatch.run_back(pending, batch, host)
    assert host.moved == 2 * sum(gradient.nbytes for gradient in pending.gradients)
    found = pending.score.loss.item(), pending.score.accuracy.item(), work.gradients()
    assert_same(found, plain(work), relative=1e-10)

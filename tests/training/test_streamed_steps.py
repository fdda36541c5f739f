"""Every layout takes the step of the whole batch, in the room and with the bytes moved that are predicted for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwise.cache.dtypes import STORED
from layerwise.config import Config, resolve
from layerwise.data.batches import Batch
from layerwise.data.source import DataSet
from layerwise.memory import microbatch
from layerwise.memory.meter import Meter
from layerwise.memory.plan import ROOMS, ROOMS_OF_GPU, MemoryPlan
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network
from layerwise.training.budget import allowed_plans
from layerwise.training.context import RunContext
from layerwise.training.cut import cut_network
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import StageTrainer, StepRandomness
from layerwise.training.training_peak import training_peak
from layerwise.training.work import step_moved, waiting_bytes

CPU = torch.device("cpu")
OBJECTIVES = ("infonce", "hinge", "ntxent", "supervised")


def pictures(build: Callable[[], nn.Module]) -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), build(), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    return traced_network(model, (3, 8, 8))


class Decaying(Layer):
    """Changes its weight at every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)
        return self.linear(x)


class Bounded(Layer):
    """Keeps its weight within bounds through `.data`, which no version counts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear.weight.data.clamp_(-0.5, 0.5)
        self.linear.weight.data = torch.renorm(self.linear.weight.data, 2, 0, 0.4)
        return self.linear(x)


class Averaging(Layer):
    """Puts a new tensor in the place of its buffer at every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 32)
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 1))
        return y - self.mean


def spectral_norm() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 16, 1))


class Scanning(nn.Module):
    """An LSTM that goes over a picture point by point."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(2, (8, 8))


SPEECH = {"net.width": 32, "net.context": 32, "data.window": 800, "objective.anchors": 64}
"""Every frame is an anchor, so that a draw has no accidents."""
DENSE = {"net.centred": True, "net.dense": True}
PICTURES = {"training.batch_size": 4, "training.stages": 1}
WHOLE = PICTURES | {
    "net.name": "own",
    "data.frames": "whole",
    "data.picture": 8,
    "data.patch": 8,
    "data.crop": 8,
    "objective.cells": 8,
}
"""Pictures of which the objective compares the positions."""
CONVNET = WHOLE | {"net.name": "convnet", "net.width": 16, "net.blocks": [1], "data.picture": 48, "data.patch": 48}
CONVNET |= {"data.crop": 48}
STAGES: dict[str, tuple[str, int, dict[str, object], Callable[[], Network] | None]] = {
    "convolution": ("speech", 2, SPEECH, None),
    "convolutions": ("speech", 1, SPEECH | {"training.stages": 2, "net.context": 0}, None),
    "dense convolution": ("speech", 2, SPEECH | DENSE, None),
    "GRU": ("speech", 4, SPEECH, None),
    "dense GRU": ("speech", 4, SPEECH | DENSE, None),
    "picture blocks": ("vision", 1, PICTURES | {"net.width": 8, "net.blocks": [1, 1]}, None),
    "LSTM": ("vision", 1, PICTURES, partial(pictures, Scanning)),
    "batch norm": ("vision", 1, PICTURES, partial(pictures, partial(nn.BatchNorm2d, 16))),
    "spectral norm": ("vision", 1, PICTURES, partial(pictures, spectral_norm)),
    "dropout": ("vision", 1, PICTURES, partial(pictures, partial(nn.Dropout, 0.3))),
    "feature maps": ("vision", 1, WHOLE, partial(pictures, nn.Identity)),
    "patches and a convolution": ("vision", 1, CONVNET, None),
    "short floats": ("speech", 2, SPEECH | {"training.precision": "bfloat16"}, None),
    "decaying weights": ("speech", 1, {"data.window": 400}, lambda: Network([Decaying], (1,))),
    "bounded weights": ("speech", 1, {"data.window": 400}, lambda: Network([Bounded], (1,))),
    "an average": ("speech", 1, {"data.window": 400}, lambda: Network([Averaging], (1,))),
}
"""Name to the kind of its options, its number, further options, and its network where it is one's own."""


@dataclass(frozen=True, eq=False)
class Task:
    """A stage, and batches for it: one of full windows, and a ragged one."""

    config: Config
    spec: StageSpec

    @property
    def plans(self) -> list[MemoryPlan]:
        return [plan for family in allowed_plans(self.config, self.spec) for plan in family]

    def batch(self, ragged: bool) -> Batch:
        size, window = self.config.training.batch_size, self.spec.window
        generator = torch.Generator().manual_seed(int(ragged))
        frames = torch.randn(size, window.frames, *self.spec.frame_shape, generator=generator)
        # Samples that differ in the mean: of noise alone all would be alike, and rounding would say which are nearest.
        frames += torch.randn(size, 1, *self.spec.frame_shape, generator=generator)
        lengths = np.full(size, window.frames)
        if ragged:
            lengths[1::2] = max(window.frames * 2 // 3 // window.columns * window.columns, 1)
            for sample, length in enumerate(lengths):
                frames[sample, length:] = 0
        stored = torch.float32 if self.spec.stage == 1 else STORED[self.config.cache.dtype].tensor
        return Batch(frames.to(stored), lengths, np.array([0, 1, -1, 1]))


@dataclass(frozen=True)
class Taken:
    """What two steps and a held-out score leave."""

    losses: list[float]
    accuracies: list[float]
    weights: torch.Tensor
    """Of module and objective, buffers too, one after another."""
    peak: int
    """Of a full batch."""
    moved: int
    held: int
    """Between steps."""


@cache
def steps_of(task: Task, plan: MemoryPlan) -> Taken:
    with Meter(CPU) as meter:
        context = RunContext(CPU, meter)
        trainer = StageTrainer(task.spec, task.config, plan, context)
        meter.reset_peak()
    full, ragged = task.batch(ragged=False), task.batch(ragged=True)
    with meter:
        scores = [trainer.train(full, randomness(0))]
        moved, peak = context.host.moved, meter.peak
        scores += [trainer.train(ragged, randomness(1)), trainer.evaluate(ragged, randomness(2))]
        pairs = [(float(score.loss), float(score.accuracy)) for score in scores]
        del scores
        held = meter.live
    tensors = [*trainer.module.parameters(), *trainer.module.buffers(), *trainer.objective.parameters()]
    weights = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    assert trainer.memory_plan == plan
    return Taken([loss for loss, _ in pairs], [hits for _, hits in pairs], weights, peak, moved, held)


def randomness(number: int) -> StepRandomness:
    return StepRandomness(partial(np.random.default_rng, number), seed=number)


@pytest.fixture(scope="module")
def task(
    tiny_options: dict[str, dict[str, object]], noise_data: Callable[[Config], DataSet]
) -> Callable[[str, str], Task]:
    """task(name, objective)"""

    @cache
    def make(name: str, objective: str) -> Task:
        kind, stage, options, build = STAGES[name]
        learned = {"objective.name": objective, "training.adam_eps": 1e-4}
        learned |= {"objective.label": "kind"} if objective == "supervised" else {}
        config = resolve(overrides={**tiny_options[kind], **options, **learned})
        data = noise_data(config)
        data = replace(data, views=2, labels={"kind": np.array(["cat", "ship"] * (len(data.lengths) // 2))})
        return Task(config, cut_network(config, data, CPU, build() if build else None)[stage - 1])

    return make


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from([name for name in STAGES if name != "short floats"]),
    objective=st.sampled_from(OBJECTIVES),
    number=st.integers(0, 10**6),
)
def test_every_layout_takes_the_step_of_the_whole_batch_as_it_is_predicted(
    task: Callable[[str, str], Task], name: str, objective: str, number: int
) -> None:
    made = task(name, objective)
    plan = made.plans[number % len(made.plans)]
    # Each slice draws its own numbers, so that layouts are compared at the same slices.
    whole = MemoryPlan(plan.batch_size, plan.micro_batch if name == "dropout" else plan.batch_size)
    found, expected = steps_of(made, plan), steps_of(made, whole)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.accuracies == pytest.approx(expected.accuracies, abs=1e-6)
    assert (found.weights - expected.weights).norm() <= 1e-5 * expected.weights.norm()
    assert 0.95 <= found.peak / training_peak(made.config, made.spec, plan).bytes <= 1
    assert found.moved == pytest.approx(step_moved(made.config, made.spec, plan), rel=0.02)
    assert found.held == 0 or not plan.optimizer_on_host or name == "an average"  # its new buffer is not the lent one


def test_layouts_of_positions_and_renderings_take_the_same_step_as_it_is_predicted(
    task: Callable[[str, str], Task],
) -> None:
    made = task("feature maps", "infonce+ntxent")
    expected = steps_of(made, MemoryPlan(4, 4))
    for plan in made.plans[:: max(len(made.plans) // 4, 1)]:
        found = steps_of(made, plan)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert (found.weights - expected.weights).norm() <= 1e-5 * expected.weights.norm()
        assert 0.95 <= found.peak / training_peak(made.config, made.spec, plan).bytes <= 1


def test_recurrent_layers_whose_activations_are_worked_out_again_take_the_same_step_as_it_is_predicted(
    task: Callable[[str, str], Task],
) -> None:
    """They are rehearsed in fewer steps, in the forward pass and where it is made again."""
    made = task("LSTM", "infonce")
    expected = steps_of(made, MemoryPlan(4, 4))
    again = [plan for plan in made.plans if plan.recompute]
    for plan in (again[0], again[-1]):
        found = steps_of(made, plan)
        assert (found.weights - expected.weights).norm() <= 1e-5 * expected.weights.norm()
        assert 0.95 <= found.peak / training_peak(made.config, made.spec, plan).bytes <= 1


@pytest.mark.parametrize(
    ("name", "objective"),
    [("convolution", "infonce"), ("GRU", "hinge"), ("picture blocks", "ntxent"), ("batch norm", "supervised")],
)
def test_a_loss_that_is_worked_out_at_once_takes_the_same_step_as_it_is_predicted(
    task: Callable[[str, str], Task], name: str, objective: str
) -> None:
    made, whole = task(name, objective), MemoryPlan(4, 4)
    at_once = replace(whole, loss_room=ROOMS_OF_GPU[0])
    found, expected = steps_of(made, at_once), steps_of(made, whole)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.accuracies == pytest.approx(expected.accuracies, abs=1e-6)
    assert (found.weights - expected.weights).norm() <= 1e-5 * expected.weights.norm()
    assert 0.95 <= found.peak / training_peak(made.config, made.spec, at_once).bytes <= 1
    assert found.moved == expected.moved


@pytest.mark.parametrize("smaller", [False, True])
@pytest.mark.parametrize(
    "plan", [MemoryPlan(4, 4), MemoryPlan(4, 4, loss_room=ROOMS_OF_GPU[0]), MemoryPlan(4, 2, parts=2)], ids=str
)
def test_what_was_drawn_ahead_of_a_step_changes_nothing(
    task: Callable[[str, str], Task], plan: MemoryPlan, smaller: bool
) -> None:
    made = task("convolution", "infonce")

    def loss(ahead: bool) -> float:
        trainer = StageTrainer(made.spec, made.config, plan, RunContext(CPU, Meter(CPU)))
        batch = made.batch(False)
        if ahead:
            batch = trainer.prepared(batch, randomness(0))
        if smaller:  # as where the step before ran out of memory
            trainer.memory_plan = replace(plan, micro_batch=1, parts=4)
        return trainer.train(batch, randomness(0)).loss.item()

    assert loss(ahead=True) == loss(ahead=False)


def test_weights_that_a_forward_pass_changes_through_data_come_back_from_the_device(
    task: Callable[[str, str], Task],
) -> None:
    made = task("bounded weights", "infonce")
    whole, *_ = made.plans
    found, expected = (steps_of(made, plan) for plan in (replace(whole, optimizer_on_host=True), whole))
    assert (found.weights - expected.weights).norm() <= 1e-5 * expected.weights.norm()


@pytest.mark.parametrize("parts", [1, 2])
def test_short_floats_that_wait_on_the_host_take_no_more_than_is_predicted(
    task: Callable[[str, str], Task], parts: int
) -> None:
    made = task("short floats", "infonce")
    plan = MemoryPlan(4, 1, optimizer_on_host=True, predictors=1, parts=parts, loss_room=ROOMS[-1])
    assert 0.95 <= steps_of(made, plan).peak / training_peak(made.config, made.spec, plan).bytes <= 1


@pytest.mark.parametrize("parts", [1, 4])
def test_what_waits_on_the_host_is_planned(
    task: Callable[[str, str], Task], parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, waited = task("GRU", "infonce"), []

    def watched(batch: microbatch.SlicedBatch, encoded: microbatch.Representations, *rest: object) -> object:
        pending = loss_gradients(batch, encoded, *rest)  # type: ignore[arg-type]
        waited.append(sum(tensor.nbytes for tensor in (*encoded.encoded, *pending.gradients)))
        return pending

    loss_gradients = microbatch.loss_gradients
    monkeypatch.setattr(microbatch, "loss_gradients", watched)
    plan = MemoryPlan(4, 1, parts=parts)
    StageTrainer(made.spec, made.config, plan, RunContext(CPU, Meter(CPU))).train(made.batch(False), randomness(0))
    part = waiting_bytes(made.config, made.spec, plan) - waited[0]
    assert 0 < part <= waited[0]
    assert waiting_bytes(made.config, made.spec, replace(plan, parts=0)) == 0


def test_tensors_that_an_objective_holds_beside_its_parameters_come_to_the_device_with_it(
    task: Callable[[str, str], Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = task("convolution", "supervised")
    plan = MemoryPlan(4, 4, optimizer_on_host=True)
    trainer = StageTrainer(made.spec, made.config, plan, RunContext(CPU, Meter(CPU)))
    on_host = torch.ones(3)
    objective = trainer.objective
    objective.mask = on_host
    lies_at, score, places = on_host.data_ptr(), objective.forward, []

    def watched(*args: object) -> object:
        places.append(objective.mask.data_ptr())
        return score(*args)

    monkeypatch.setattr(objective, "forward", watched)
    trainer.train(made.batch(False), randomness(0))
    assert places != [lies_at]
    assert on_host.data_ptr() == lies_at

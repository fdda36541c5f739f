"""A step under the budget: smaller slices where memory runs out, and the same step whatever happens on the way."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwise.config import Config
from layerwise.data.batches import Batch
from layerwise.errors import BudgetError, ConfigError
from layerwise.memory.meter import Meter
from layerwise.memory.plan import NARROW_ROOM, MemoryPlan
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network
from layerwise.stop import StopFlag
from layerwise.training.budget import fit_stage, fit_to_budget, smallest_budget
from layerwise.training.cache_plan import CachePlan
from layerwise.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from layerwise.training.context import RunContext
from layerwise.training.optimizer import FIRST_SCALE, STEPS_UNTIL_DOUBLED, LossScale
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import NoSmallerSlices, StageTrainer, StepRandomness

CPU = torch.device("cpu")
Planned = Callable[..., tuple[Config, list[StageSpec]]]


@dataclass(frozen=True)
class Task:
    """A stage, and a batch for it."""

    config: Config
    plan: StageSpec
    batch: Batch

    @property
    def whole(self) -> MemoryPlan:
        return MemoryPlan(len(self.batch.lengths), len(self.batch.lengths))

    @property
    def smallest(self) -> MemoryPlan:
        return MemoryPlan(len(self.batch.lengths), 1, parts=len(self.batch.lengths), loss_room=NARROW_ROOM)

    def load(self, memory_plan: MemoryPlan, meter: Meter) -> StageTrainer:
        return StageTrainer(self.plan, self.config, memory_plan, RunContext(CPU, meter))

    def changed(self, **options: object) -> "Task":
        """The same with other options of training."""
        training = self.config.training.model_copy(update=options)
        return replace(self, config=self.config.model_copy(update={"training": training}))


@dataclass(frozen=True)
class Step:
    """What a step leaves, and the bytes it took."""

    loss: float
    accuracy: float
    weights: torch.Tensor
    """Of module and predictors, one after another."""
    memory_plan: MemoryPlan
    held: int
    """Before the step."""
    peak: int


def make_task(planned: tuple[Config, list[StageSpec]], stage: int, ragged: bool = False) -> Task:
    config, plans = planned
    plan = plans[stage - 1]
    generator = torch.Generator().manual_seed(stage)
    count, longest = config.training.batch_size, plan.window.frames
    frames = torch.randn(count, longest, *plan.frame_shape, generator=generator)
    lengths = np.full(count, longest)
    if ragged:
        lengths[1::2] = longest * 2 // 3 // plan.window.columns * plan.window.columns
        for sample, length in enumerate(lengths):
            frames[sample, length:] = 0
    return Task(config, plan, Batch(frames, lengths))


def randomness(number: int = 0) -> StepRandomness:
    return StepRandomness(partial(np.random.default_rng, number), seed=number)


def take_step(task: Task, memory_plan: MemoryPlan, limit: int | None = None) -> Step:
    """One step from the first weights, with `limit` bytes from when the stage is loaded."""
    with Meter(CPU) as meter:
        loaded = task.load(memory_plan, meter)
        held = meter.live
        meter.reset_peak()
        meter.limit = limit
        score = loaded.train(task.batch, randomness())
        meter.limit = None
        weights = all_weights(loaded)
        return Step(score.loss.item(), score.accuracy.item(), weights, loaded.memory_plan, held, meter.peak)


def all_weights(loaded: StageTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in [*loaded.module.parameters(), *loaded.objective.parameters()]])


def assert_same_step(found: Step, expected: Step) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-6)
    assert (found.weights - expected.weights).norm() <= 1e-5 * expected.weights.norm()


STAGES = {"convolution": ("speech", 2), "GRU": ("speech", 4), "picture blocks": ("vision", 2)}


@pytest.fixture(scope="module", autouse=True)
def a_short_way_for_the_collector() -> Iterator[None]:
    """Each smaller slice calls it, and it need not look through torch and pytest every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tasks(planned_stages: Planned) -> dict[str, Task]:
    planned = {
        "speech": planned_stages("speech", **{"net.width": 16, "net.context": 16, "data.window": 800}),
        "vision": planned_stages("vision", **{"net.width": 4, "training.batch_size": 4}),
    }
    return {name: make_task(planned[kind], stage, ragged=kind == "speech") for name, (kind, stage) in STAGES.items()}


@pytest.fixture(scope="module")
def undisturbed(tasks: dict[str, Task]) -> dict[str, tuple[Step, Step]]:
    """A step at the whole batch, and one in the smallest slices."""
    return {name: (take_step(task, task.whole), take_step(task, task.smallest)) for name, task in tasks.items()}


STARTS: dict[str, dict[str, object]] = {
    "whole": {},
    "on the host": {"optimizer_on_host": True},
    "streamed": {"optimizer_on_host": True, "predictors": 1, "parts": 1, "gradients_at_once": True},
}
"""Of the memory plan, beside the micro-batch."""


@pytest.fixture(scope="module")
def peaks(tasks: dict[str, Task]) -> Callable[[str, str], tuple[int, int]]:
    """peaks(name, start): of a step that begins in this layout, and of one in the smallest slices that it may come to."""

    @cache
    def of_steps(name: str, start: str) -> tuple[int, int]:
        task = tasks[name]
        plans = replace(task.whole, **STARTS[start]), replace(task.smallest, **STARTS[start] | {"parts": 4})
        return take_step(task, plans[0]).peak, take_step(task, plans[1]).peak

    return of_steps


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(list(STAGES)), start=st.sampled_from(list(STARTS)), part=st.floats(0, 1))
def test_a_step_that_runs_out_of_memory_anywhere_ends_as_if_it_had_not(
    tasks: dict[str, Task],
    undisturbed: dict[str, tuple[Step, Step]],
    peaks: Callable[[str, str], tuple[int, int]],
    name: str,
    start: str,
    part: float,
) -> None:
    task, (whole, _), (largest, smallest) = tasks[name], undisturbed[name], peaks(name, start)
    begun = replace(task.whole, **STARTS[start])
    limit = smallest + int(part * (largest - smallest))
    found = take_step(task, begun, limit)
    assert_same_step(found, whole)
    assert (found.memory_plan == begun) == (limit >= largest)


@pytest.mark.parametrize("name", STAGES)
def test_the_least_memory_that_a_step_gets_by_with_is_that_of_the_smallest_slices(
    tasks: dict[str, Task], undisturbed: dict[str, tuple[Step, Step]], name: str
) -> None:
    task, (whole, smallest) = tasks[name], undisturbed[name]

    def succeeds(limit: int) -> bool:
        try:
            assert_same_step(take_step(task, task.whole, limit), whole)
        except BudgetError:
            return False
        return True

    too_little, enough = smallest.held, whole.peak
    near = (enough - too_little) // 64
    while enough - too_little > near:
        middle = (too_little + enough) // 2
        too_little, enough = (too_little, middle) if succeeds(middle) else (middle, enough)
    assert smallest.peak - near <= enough <= smallest.peak + near


@pytest.mark.parametrize("name", STAGES)
def test_the_held_out_score_is_the_same_in_smaller_slices(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]

    def score(limit: int | None) -> tuple[float, MemoryPlan, int]:
        with Meter(CPU) as meter:
            loaded = task.load(task.whole, meter)
            meter.reset_peak()
            meter.limit = limit
            return loaded.evaluate(task.batch, randomness()).loss.item(), loaded.memory_plan, meter.peak

    loss, _, peak = score(None)
    for limit in (peak - 1, peak * 7 // 10):
        in_slices, memory_plan, _ = score(limit)
        assert memory_plan != task.whole
        assert in_slices == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_below_the_smallest_it_raises_and_leaves_nothing_behind(
    tasks: dict[str, Task], undisturbed: dict[str, tuple[Step, Step]], name: str, part: float
) -> None:
    task, (_, smallest) = tasks[name], undisturbed[name]
    with Meter(CPU) as meter:
        loaded = task.load(task.whole, meter)
        held = meter.live
        meter.limit = held + int(part * (smallest.peak - held))
        try:
            loaded.train(task.batch, randomness())
        except BudgetError as error:
            assert "give a larger --gpu-mem" in str(error)
        else:
            raise AssertionError("a step ended below the memory that it needs")
        meter.limit = None
        # Torch keeps the graph of a backward pass that failed while adding up gradients until the next one (2.12).
        torch.zeros((), requires_grad=True).backward()
        gc.collect()
        assert meter.live == held
        del loaded
        gc.collect()
        assert meter.live == 0


def test_a_step_leaves_no_gradients_and_only_its_score(tasks: dict[str, Task]) -> None:
    task = tasks["convolution"]
    for memory_plan in (task.whole, task.smallest):
        with Meter(CPU) as meter:
            loaded = task.load(memory_plan, meter)
            held = meter.live
            score = loaded.train(task.batch, randomness())
            assert all(p.grad is None for p in [*loaded.module.parameters(), *loaded.objective.parameters()])
            assert not score.loss.requires_grad
            assert meter.live == held + 8
            del score


def test_an_unmetered_step_leaves_the_count_as_it_was(tasks: dict[str, Task]) -> None:
    task = tasks["picture blocks"]
    with Meter(CPU) as meter:
        loaded = task.load(task.whole, meter)
        held = meter.live
        for step in range(4):
            loaded.train(task.batch, randomness(step))
            gc.collect()
            assert meter.live == held


class Drawing(Layer):
    """Linear, and what draws random numbers."""

    def __init__(self, channels_in: int, channels: int, draw: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(channels_in, channels), draw()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(self.linear(x))


DRAWING: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.4)),
    "RReLU": lambda: nn.RReLU(0, 1),
}


@pytest.fixture(scope="module", params=DRAWING)
def dropping(request: pytest.FixtureRequest, planned_stages: Planned) -> Task:
    draw = DRAWING[request.param]
    network = Network([partial(Drawing, 1, 12, draw), partial(Drawing, 12, 12, draw)], natural_cut=(2,))
    return make_task(planned_stages("speech", network, **{"data.window": 400}), 1)


def test_a_step_with_dropout_that_runs_out_of_memory_is_repeated_with_the_same_random_numbers(dropping: Task) -> None:
    expected = {micro: take_step(dropping, MemoryPlan(4, micro)) for micro in (4, 2, 1)}
    assert abs(expected[4].loss - expected[2].loss) > 1e-4  # each slice draws its own, so they can be told apart
    for micro in (4, 2):
        found = take_step(dropping, MemoryPlan(4, 4), limit=expected[micro].peak - 1)
        assert found.memory_plan.micro_batch == micro // 2
        assert_same_step(found, expected[micro // 2])
    assert_same_step(take_step(dropping, MemoryPlan(4, 2, recompute=True)), expected[2])
    # Wherever the representations wait, and in however many parts they are scored, the slices draw the same.
    for parts in (1, 4):
        assert_same_step(take_step(dropping, MemoryPlan(4, 2, parts=parts)), expected[2])


def test_a_step_draws_from_its_own_generators_alone(dropping: Task) -> None:
    with Meter(CPU) as meter:
        loaded = dropping.load(MemoryPlan(4, 2), meter)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = loaded.evaluate(dropping.batch, randomness(0)).loss.item()
        loaded.train(dropping.batch, randomness(0))
        assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with Meter(CPU) as meter:
        again = dropping.load(MemoryPlan(4, 2), meter)
        assert again.evaluate(dropping.batch, randomness(0)).loss.item() == first
        again.train(dropping.batch, randomness(0))
    assert torch.equal(all_weights(loaded), all_weights(again))


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    )


@pytest.fixture(scope="module")
def mixing(planned_stages: Planned) -> Task:
    network = traced_network(normalised(), (3, 8, 8))
    return make_task(planned_stages("vision", network, **{"training.stages": 1}), 1)


def test_a_module_that_ties_samples_together_is_not_sliced_and_the_sentence_names_it(mixing: Task) -> None:
    peak = take_step(mixing, mixing.whole).peak
    for limit in (peak - 1, peak // 2):
        with pytest.raises(NoSmallerSlices, match=r"unit\.1 \(BatchNorm2d\) ties the samples of a batch together"):
            take_step(mixing, mixing.whole, limit)


def test_the_plan_of_a_module_that_ties_samples_together_names_it_too(mixing: Task) -> None:
    memory = mixing.config.memory.model_copy(update={"gpu_mem": 100_000})
    config = mixing.config.model_copy(update={"memory": memory})
    with pytest.raises(BudgetError, match=r"unit\.1 \(BatchNorm2d\) ties .* lower --batch-size"):
        fit_to_budget(config, [mixing.plan], CachePlan((True,)), CPU, set(), StopFlag())


@pytest.mark.parametrize(
    "asked", [{"recompute": "auto"}, {"recompute": "always"}, {"recompute": "never"}, {"gpu_mem": 0}]
)
def test_running_statistics_count_each_batch_once(mixing: Task, asked: dict[str, object]) -> None:
    if "gpu_mem" in asked:
        asked = {"gpu_mem": smallest_budget(mixing.config, mixing.plan, CPU)}
    memory = mixing.config.memory.model_copy(update=asked)
    config = mixing.config.model_copy(update={"memory": memory})
    memory_plan = fit_stage(config, mixing.plan, CPU)
    assert bool(memory_plan.parts) == ("gpu_mem" in asked)
    with Meter(CPU) as meter:
        loaded = StageTrainer(mixing.plan, config, memory_plan, RunContext(CPU, meter))
        loaded.train(mixing.batch, randomness())
        counts = [int(value) for name, value in loaded.module.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [1, 1]


@pytest.fixture(scope="module")
def changing(planned_stages: Planned) -> Task:
    """A stage whose parts change at every forward pass."""
    torch.manual_seed(0)
    convolutions = [nn.utils.parametrizations.spectral_norm(nn.Conv2d(n, 6, 3)) for n in (3, 6)]
    network = traced_network(nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1]), (3, 8, 8))
    return make_task(planned_stages("vision", network, **{"training.stages": 1}), 1)


@pytest.mark.parametrize("asked", [{"micro_batch": 1}, {"recompute": "always"}])
def test_a_module_that_changes_at_every_pass_is_not_sliced_nor_run_again_for_activations(
    changing: Task, asked: dict[str, object]
) -> None:
    memory = changing.config.memory.model_copy(update=asked)
    memory_plan = fit_stage(changing.config.model_copy(update={"memory": memory}), changing.plan, CPU)
    assert_same_step(take_step(changing, memory_plan), take_step(changing, changing.whole))


def test_a_module_that_changes_at_every_pass_is_not_run_again_where_memory_ends(changing: Task) -> None:
    peak = take_step(changing, changing.whole).peak
    for limit in (peak - 1, peak // 2):
        with pytest.raises(NoSmallerSlices, match=r"\(_SpectralNorm\) changes its '_u' at every forward pass, so"):
            take_step(changing, changing.whole, limit)


@pytest.mark.parametrize("on_host", [False, True])
def test_frozen_parameters_stay_as_they_are(planned_stages: Planned, tmp_path: Path, on_host: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3))
    model[0].weight.requires_grad_(False)
    task = make_task(
        planned_stages("vision", traced_network(model, (3, 8, 8)), **{"training.stages": 1, "training.batch_size": 4}),
        1,
    )
    memory_plan = replace(task.whole, micro_batch=2, optimizer_on_host=on_host)
    with Meter(CPU) as meter:
        loaded = task.load(memory_plan, meter)
        for number in range(2):
            loaded.train(task.batch, randomness(number))
        save_checkpoint(tmp_path / "checkpoint", "test", Progress(), loaded, None)
        resumed = task.load(memory_plan, meter)
        load_checkpoint(tmp_path / "checkpoint", "test", resumed)
        for each in (loaded, resumed):
            each.train(task.batch, randomness(2))
    assert torch.equal(all_weights(loaded), all_weights(resumed))
    trained = [value.detach() for value in loaded.module.parameters()]
    for found, before in zip(trained, model.parameters(), strict=True):
        assert torch.equal(found, before) == (not before.requires_grad)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_network_whose_first_units_are_frozen_is_trained_from_there_on(planned_stages: Planned, stages: int) -> None:
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())])
    model[:2].requires_grad_(False)
    network = traced_network(model, (3, 8, 8))
    options = {"training.stages": stages, "training.batch_size": 4, "memory.gpu_mem": "50MB"}
    config, plans = planned_stages("vision", network, **options)
    assert len(plans) == stages
    for plan in plans:
        task = make_task((config, plans), plan.stage)
        with Meter(CPU) as meter:
            loaded = task.load(fit_stage(config, plan, CPU), meter)
            before = [parameter.detach().clone() for parameter in loaded.module.parameters()]
            loaded.train(task.batch, randomness())
        trained = list(loaded.module.parameters())
        assert any(parameter.requires_grad for parameter in trained)
        for parameter, was in zip(trained, before, strict=True):
            assert torch.equal(parameter, was) == (not parameter.requires_grad)


def test_a_layer_with_nothing_to_train_is_refused_as_a_stage_and_taken_into_one(planned_stages: Planned) -> None:
    class Halving(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    layers = [Halving, partial(Drawing, 1, 12, nn.ReLU)]
    plans = planned_stages("speech", Network(layers, (2,)), **{"data.window": 400})[1]
    assert len(plans) == 1
    with pytest.raises(ConfigError, match="Stage 1, layer 0 of the network, has nothing to train"):
        planned_stages("speech", Network(layers, (1, 1)), **{"data.window": 400})


def test_steps_and_first_weights_seed_no_other_devices_generators(
    tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    task = tasks["convolution"]
    task.plan.build_objective(task.config, CPU)
    take_step(task, task.smallest)


def refuse(*_: object) -> None:
    raise AssertionError("the generators of all GPUs were seeded")


def test_adam_on_the_host_takes_the_same_steps_to_the_bit(tasks: dict[str, Task]) -> None:
    task = tasks["convolution"]
    weights = []
    for on_host in (False, True):
        with Meter(CPU) as meter:
            loaded = task.load(replace(task.whole, optimizer_on_host=on_host), meter)
            for number in range(3):
                loaded.train(task.batch, randomness(number))
            weights.append(all_weights(loaded))
    assert torch.equal(*weights)


def test_with_adam_on_the_host_nothing_is_on_the_device_between_steps(tasks: dict[str, Task]) -> None:
    task = tasks["convolution"]
    held = []
    for on_host in (False, True):
        with Meter(CPU) as meter:
            loaded = task.load(replace(task.whole, optimizer_on_host=on_host), meter)
            loaded.train(task.batch, randomness())
            held.append(meter.live)
    with_moments = 3 * 4 * len(all_weights(loaded))
    tensors = len([*loaded.module.parameters(), *loaded.objective.parameters()])
    assert held == [with_moments + 4 * tensors, 0]


LAYOUTS = {
    "whole": MemoryPlan(4, 4),
    "on the host": MemoryPlan(4, 4, optimizer_on_host=True),
    "streamed": MemoryPlan(4, 2, optimizer_on_host=True, predictors=1, parts=2, gradients_at_once=True),
    "sliced": MemoryPlan(4, 1, recompute=True),
}


@pytest.mark.parametrize("saved_with", LAYOUTS)
@pytest.mark.parametrize("loaded_with", LAYOUTS)
def test_a_checkpoint_of_one_layout_goes_on_in_another(
    tasks: dict[str, Task], tmp_path: Path, saved_with: str, loaded_with: str
) -> None:
    task, path = tasks["GRU"], tmp_path / "checkpoint"
    with Meter(CPU) as meter:
        loaded = task.load(LAYOUTS[saved_with], meter)
        for number in range(2):
            loaded.train(task.batch, randomness(number))
        save_checkpoint(path, "test", Progress(step=2), loaded, None)
        loaded.train(task.batch, randomness(2))
        expected = all_weights(loaded)
    with Meter(CPU) as meter:
        resumed = task.load(LAYOUTS[loaded_with], meter)
        restored = load_checkpoint(path, "test", resumed)
        assert restored is not None
        assert restored[0].step == 2
        resumed.train(task.batch, randomness(2))
        found = all_weights(resumed)
    same_slices = {saved_with, loaded_with} <= {"whole", "on the host"} or saved_with == loaded_with
    if same_slices:
        assert torch.equal(found, expected)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("part", [0.1, 0.6])
def test_a_stage_that_had_to_shrink_goes_on_in_slices_as_small(
    tasks: dict[str, Task], undisturbed: dict[str, tuple[Step, Step]], tmp_path: Path, part: float
) -> None:
    task, (whole, smallest), path = tasks["GRU"], undisturbed["GRU"], tmp_path / "checkpoint"
    with Meter(CPU) as meter:
        loaded = task.load(task.whole, meter)
        meter.limit = smallest.peak + int(part * (whole.peak - smallest.peak))
        loaded.train(task.batch, randomness(0))
        save_checkpoint(path, "test", Progress(step=1), loaded, None)
        loaded.train(task.batch, randomness(1))
        expected, shrunk = all_weights(loaded), loaded.memory_plan
    assert shrunk != task.whole
    for started_with in (task.whole, task.smallest):
        with Meter(CPU) as meter:
            resumed = task.load(started_with, meter)
            load_checkpoint(path, "test", resumed)
            if started_with == task.whole:
                assert resumed.memory_plan == shrunk
            else:
                # A smaller budget than before asks for slices that are smaller still.
                assert resumed.memory_plan == task.smallest
            resumed.train(task.batch, randomness(1))
            found = all_weights(resumed)
        if started_with == task.whole:
            assert torch.equal(found, expected)
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_resume_the_meter_still_knows_what_is_what(tasks: dict[str, Task], tmp_path: Path, layout: str) -> None:
    task, path = tasks["convolution"], tmp_path / "checkpoint"
    with Meter(CPU) as meter:
        loaded = task.load(LAYOUTS[layout], meter)
        loaded.train(task.batch, randomness())
        save_checkpoint(path, "test", Progress(), loaded, None)
        meter.reset_peak()
        before, held = meter.peak_by_kind, meter.live
    with Meter(CPU) as meter:
        resumed = task.load(LAYOUTS[layout], meter)
        load_checkpoint(path, "test", resumed)
        meter.reset_peak()
        assert meter.live == held
        assert meter.peak_by_kind == before


def test_the_loss_scale_survives_a_checkpoint(tasks: dict[str, Task], tmp_path: Path) -> None:
    task, path = tasks["convolution"].changed(precision="float16"), tmp_path / "checkpoint"
    with Meter(CPU) as meter:
        loaded = task.load(task.whole, meter)
        loaded.scale = LossScale(2.0**9, 77)
        save_checkpoint(path, "test", Progress(), loaded, None)
        resumed = task.load(task.whole, meter)
        load_checkpoint(path, "test", resumed)
    assert resumed.scale == LossScale(2.0**9, 77)


def test_only_float16_is_scaled() -> None:
    assert LossScale.of("float16").factor == FIRST_SCALE
    assert LossScale.of("bfloat16").factor == LossScale.of("float32").factor == 1
    untouched = with_gradient(float("inf"))
    assert LossScale.of("bfloat16").unscale([untouched])


def with_gradient(value: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), value)
    return parameter


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_scale_halves_where_a_gradient_overflows_and_never_ends(bad: float) -> None:
    scale = LossScale(8.0, 5)
    factors = []
    for _ in range(4):
        assert not scale.unscale([with_gradient(1.0), with_gradient(bad)])
        factors.append(scale.factor)
    assert factors == [4, 2, 2, 2]
    assert scale.good_steps == 0


def test_the_scale_divides_and_doubles_after_many_good_steps() -> None:
    scale = LossScale(8.0, STEPS_UNTIL_DOUBLED - 2)
    parameter, without = with_gradient(4.0), nn.Parameter(torch.zeros(1))
    assert scale.unscale([parameter, without])
    assert torch.equal(parameter.grad, torch.full((3,), 0.5))
    assert scale == LossScale(8.0, STEPS_UNTIL_DOUBLED - 1)
    assert scale.unscale([with_gradient(1.0)])
    assert scale == LossScale(16.0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_whose_gradients_overflow_is_left_out_until_the_scale_is_small_enough(
    tasks: dict[str, Task], layout: str
) -> None:
    task = tasks["convolution"].changed(precision="float16")
    with Meter(CPU) as meter:
        loaded = task.load(LAYOUTS[layout], meter)
        before = [parameter.detach().clone() for parameter in loaded.module.parameters()]
        loaded.scale.factor = 2.0**40
        loaded.train(task.batch, randomness())
        assert loaded.scale.factor == 2.0**39
        assert all(map(torch.equal, before, loaded.module.parameters()))
        assert all(float(state["step"]) == 0 for state in loaded.optimizer.state().values())
        while loaded.scale.good_steps == 0:
            loaded.train(task.batch, randomness())
            assert loaded.scale.factor >= 2
        assert not any(map(torch.equal, before, loaded.module.parameters()))
        assert all(parameter.isfinite().all() for parameter in loaded.module.parameters())


def gradients_of_a_step(task: Task, memory_plan: MemoryPlan) -> torch.Tensor:
    """Of the module, when it steps: unscaled."""
    found: list[torch.Tensor] = []
    with Meter(CPU) as meter:
        loaded = task.load(memory_plan, meter)
        take = loaded.optimizer.step

        def look_and_step() -> None:
            found.extend(parameter.grad.detach().flatten() for parameter in loaded.module.parameters())
            take()

        loaded.optimizer.step = look_and_step
        loaded.train(task.batch, randomness())
        return torch.cat(found).clone()


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("layout", ["whole", "sliced", "streamed"])
@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.05), ("float16", 0.03)])
def test_steps_in_short_floats_have_gradients_near_those_of_float32(
    tasks: dict[str, Task], name: str, layout: str, precision: str, most: float
) -> None:
    task = tasks[name]
    expected = gradients_of_a_step(task, LAYOUTS[layout])
    found = gradients_of_a_step(task.changed(precision=precision), LAYOUTS[layout])
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert (found - expected).norm() < most * expected.norm()

"""The meter counts live storages, whatever happens to the tensors on them, and says what they are."""

import contextlib
import gc
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from layerwise.config import Config
from layerwise.data.batches import Batch
from layerwise.errors import BudgetError
from layerwise.memory.meter import KINDS, METER_EVERY, Kind, Meter, host_tensor, metered, rehearsal, uncounted
from layerwise.memory.plan import MemoryPlan
from layerwise.training.context import RunContext
from layerwise.training.optimizer import Optimizer
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import StageTrainer, StepRandomness

CPU = torch.device("cpu")
Planned = Callable[..., tuple[Config, list[StageSpec]]]
KILO = 250  # float32 values in 1000 bytes


def test_live_bytes_follow_creation_and_deletion() -> None:
    with Meter(CPU) as meter:
        first = torch.zeros(KILO)
        second = torch.ones(2 * KILO)
        assert meter.live == 3000
        del first
        assert (meter.live, meter.peak) == (2000, 3000)
        meter.reset_peak()
        assert meter.peak == 2000
        del second
    assert meter.live == 0


def test_views_and_in_place_results_share_their_storage() -> None:
    with Meter(CPU) as meter:
        x = torch.zeros(KILO)
        views = [x[10:], x.view(-1, 1), x.add_(1), x.detach()]
        assert meter.live == 1000
        del x
        assert meter.live == 1000
        del views
        assert meter.live == 0


def test_tensors_that_only_autograd_holds_count() -> None:
    with Meter(CPU) as meter:
        x = torch.ones(KILO, requires_grad=True)
        y = (x.exp() * 2).sum()
        assert meter.live == 2000 + 4  # x, exp(x) saved for the backward pass, y
        y.backward()
        assert meter.live == 2000 + 4  # x, its gradient, y
        x.grad = None
        del x, y
        gc.collect()
        assert meter.live == 0


def test_a_resized_storage_counts_at_its_new_size() -> None:
    with Meter(CPU) as meter:
        x = torch.zeros(KILO)
        x.resize_(3 * KILO)
        assert meter.live == 3000


def test_tensors_made_outside_do_not_count() -> None:
    outside = torch.zeros(KILO)
    with Meter(CPU) as meter:
        assert meter.live == 0
        inside = outside.clone()
        assert meter.live == 1000
        del inside


def test_the_limit_is_kept() -> None:
    with Meter(CPU, limit=2500) as meter:
        kept = torch.zeros(KILO)
        with pytest.raises(BudgetError, match="2,500 bytes"):
            torch.zeros(2 * KILO)
        del kept
        assert meter.peak == 3000


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)), (16, 64)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(4, 64, 5), nn.ReLU(), nn.Conv1d(64, 64, 5)), (8, 4, 300)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True), (4, 30, 16)),
}
"""Kind to how it is built, and the shape of its input."""


class Steps:
    """Adam on a small network of a kind, from the weights on."""

    def __init__(self, kind: str) -> None:
        build, self.shape = NETWORKS[kind]
        self.model = build()
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)

    def take(self, between: Callable[[], None] = lambda: None) -> None:
        for _ in range(2):
            self.model(torch.zeros(self.shape)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            between()


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_prediction_equals_the_measurement_of_the_same_work(kind: str) -> None:
    with Meter(CPU) as meter:
        Steps(kind).take()
    with rehearsal() as rehearsed:
        Steps(kind).take()
    assert rehearsed.peak == meter.peak


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_meter_agrees_with_torchs_own_tracker(kind: str) -> None:
    with FakeTensorMode():
        steps, tracker = Steps(kind), MemTracker()
        tracker.track_external(steps.model, steps.optimizer)
        with tracker:
            steps.take(between=tracker.reset_mod_stats)
    with FakeTensorMode(), Meter(CPU) as meter:
        Steps(kind).take()
    assert meter.peak == tracker.get_tracker_snapshot("peak")[CPU]["Total"]


def test_tensors_on_the_host_do_not_count() -> None:
    with Meter(CPU) as meter:
        shared = host_tensor(np.zeros(1000))
        with uncounted():
            made = torch.zeros(1000)
        assert meter.live == 0
        copies = [shared.to("cpu", copy=True), made.clone()]
        assert meter.live == 8000 + 4000
        del copies


def test_lengths_on_the_host_do_not_count() -> None:
    with Meter(CPU) as meter:
        np.zeros(1000)
        assert meter.live == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["make", "label", "drop", "grow", "reset"]), st.integers(0, 5), st.sampled_from(KINDS)
        ),
        max_size=30,
    )
)
def test_the_kinds_add_up_whatever_is_made_labelled_and_dropped(acts: list[tuple[str, int, Kind]]) -> None:
    held: dict[int, torch.Tensor] = {}
    kinds: dict[int, Kind] = {}
    with Meter(CPU) as meter:
        for act, place, kind in acts:
            if act == "make":
                held[place], kinds[place] = torch.zeros(10 * (place + 1)), "activations"
            elif act == "label" and place in held:
                meter.label(kind, [held[place][1:], None])  # a view stands for its storage
                kinds[place] = kind
            elif act == "drop":
                held.pop(place, None)
            elif act == "grow" and place in held:
                held[place].resize_(len(held[place]) + 7)
            elif act == "reset":
                meter.reset_peak()
            assert meter.live == sum(tensor.untyped_storage().nbytes() for tensor in held.values())
            assert sum(meter.peak_by_kind.values()) == meter.peak
        meter.reset_peak()
        for kind in KINDS:
            now = sum(t.untyped_storage().nbytes() for place, t in held.items() if kinds[place] == kind)
            assert meter.peak_by_kind[kind] == now
        held.clear()


def test_what_was_made_outside_cannot_be_labelled() -> None:
    outside = torch.zeros(KILO)
    with Meter(CPU) as meter:
        meter.label("parameters", [outside])
        assert meter.peak_by_kind == dict.fromkeys(KINDS, 0)


class Observed:
    """A stage of one convolution, and what the meter tells when its parts step."""

    def __init__(self, planned: tuple[Config, list[StageSpec]], meter: Meter, **layout: object) -> None:
        config, specs = planned
        self.meter, self.spec = meter, specs[1]
        self.trainer = StageTrainer(self.spec, config, MemoryPlan(4, 4, **layout), RunContext(CPU, meter))
        self.at_step = self._watch(self.trainer.optimizer)
        self.at_predictors_step = self._watch(self.trainer.predictor_optimizer)

    @property
    def now(self) -> dict[Kind, int]:
        self.meter.reset_peak()
        return self.meter.peak_by_kind

    def train(self) -> None:
        with uncounted():
            batch = noise_batch(self.spec, 4)
        self.trainer.train(batch, StepRandomness(lambda: np.random.default_rng(0)))

    def _watch(self, optimizer: Optimizer) -> dict[Kind, int]:
        seen: dict[Kind, int] = {}
        step = optimizer.step

        def look_and_step() -> None:
            seen.update(self.now)
            step()

        optimizer.step = look_and_step
        return seen


NUMBERS = 16 * 16 * 8 + 16  # of a convolution over 8 frames, and its bias
PREDICTORS = 3 * 16 * 16
SCORE = 16
"""Loss and accuracy, and those of a part."""


def test_a_training_step_is_split_into_what_it_is_made_of(planned_stages: Planned) -> None:
    with Meter(CPU) as meter:
        observed = Observed(planned_stages("speech", **{"net.width": 16}), meter)
        assert observed.now == {
            "parameters": 4 * (NUMBERS + PREDICTORS),
            "gradients": 0,
            # Two moments, and the number of the step for each of three tensors.
            "optimizer": 4 * (2 * (NUMBERS + PREDICTORS) + 3),
            "activations": 0,
        }
        observed.train()
        # The predictors have stepped by now, and their gradients are gone.
        assert observed.at_step["gradients"] == 4 * NUMBERS
        assert observed.at_step["parameters"] == 4 * (NUMBERS + PREDICTORS)
        assert observed.at_step["activations"] <= SCORE
        assert sum(meter.peak_by_kind.values()) == meter.peak
        assert observed.now["gradients"] == observed.now["activations"] == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_with_the_optimizer_on_the_host_parts_of_a_step_are_there_while_they_are_needed(
    planned_stages: Planned, streamed: bool
) -> None:
    nothing = dict.fromkeys(KINDS, 0)
    with Meter(CPU) as meter:
        layout = {"parts": 2, "predictors": 1, "gradients_at_once": True} if streamed else {}
        observed = Observed(planned_stages("speech", **{"net.width": 16}), meter, optimizer_on_host=True, **layout)
        assert observed.now == nothing
        observed.train()
        # The predictors have left before they step, and the module before it does.
        module_stays = 0 if streamed else 4 * NUMBERS
        assert observed.at_predictors_step["parameters"] == module_stays
        assert observed.at_predictors_step["gradients"] == observed.at_predictors_step["optimizer"] == 0
        assert observed.at_step["activations"] <= SCORE
        assert observed.at_step | {"activations": 0} == nothing
        assert sum(meter.peak_by_kind.values()) == meter.peak
        assert observed.now == nothing


def noise_batch(plan: StageSpec, samples: int) -> Batch:
    """Full windows on the host."""
    frames = torch.randn(samples, plan.window.frames, *plan.frame_shape, generator=torch.Generator().manual_seed(0))
    return Batch(frames, np.full(samples, plan.window.frames))


def test_it_looks_at_the_first_two_steps_at_larger_ones_and_now_and_then() -> None:
    meter = Meter(CPU)
    assert [step for step in range(1, 4 * METER_EVERY) if meter.should_meter("training", 5)] == [
        1,
        2,
        METER_EVERY,
        2 * METER_EVERY,
        3 * METER_EVERY,
    ]
    assert meter.should_meter("training", 6)
    assert not meter.should_meter("training", 6)
    assert not meter.should_meter("training", 5)


def test_every_size_counts_by_itself_and_every_kind_of_step_too() -> None:
    meter = Meter(CPU)
    for sizes in [(5, 5), (5, 5), (5, 5)]:
        meter.should_meter("training", *sizes)
    assert not meter.should_meter("training", 5, 5)
    assert meter.should_meter("training", 5, 6)
    assert meter.should_meter("training", 6, 1)
    assert meter.should_meter("training", 6, 6)  # no metered step was as large in both
    assert not meter.should_meter("training", 6, 6)
    assert not meter.should_meter("training", 6, 1)
    assert meter.should_meter("caching", 1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=200))
def test_a_step_goes_unmetered_only_where_a_metered_one_was_as_large(steps: list[tuple[int, int]]) -> None:
    meter = Meter(CPU)
    seen: list[tuple[int, int]] = []
    for sizes in steps:
        if meter.should_meter("training", *sizes):
            seen.append(sizes)
        else:
            assert any(a >= sizes[0] and b >= sizes[1] for a, b in seen)


def test_a_step_that_is_not_metered_leaves_the_count_as_it_is() -> None:
    with Meter(CPU) as meter:
        kept = torch.zeros(KILO)
        with metered(False):
            torch.ones(10 * KILO).exp()
            kept.add_(1)
        assert (meter.live, meter.peak) == (1000, 1000)
        with metered(True):
            torch.ones(10 * KILO)
        assert meter.peak == 11_000


def test_a_storage_is_released_however_it_ends() -> None:
    with Meter(CPU) as meter:
        with contextlib.suppress(ZeroDivisionError):
            torch.zeros(KILO).numel() / 0
        cycle = [torch.zeros(KILO)]
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert meter.live == 0


@pytest.mark.gpu
def test_the_meter_never_exceeds_what_the_allocator_reports() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Meter(device) as meter:
        model = nn.Linear(256, 256, device=device)
        model(torch.zeros(64, 256, device=device)).sum().backward()
    assert 0 < meter.peak <= torch.cuda.max_memory_allocated() - before


def test_a_process_that_has_rehearsed_can_be_forked() -> None:
    program = (
        "import os, torch; from layerwise.memory.meter import rehearsal\n"
        "with rehearsal(): torch.nn.Linear(3, 3)(torch.zeros(2, 3)).sum().backward()\n"
        "if os.fork() == 0: torch.zeros(1, requires_grad=True).sum().backward(); os._exit(0)\n"
        "assert os.wait()[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""Predictions against what runs really take, and budgets down to the smallest one that is enough."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from layerwise.config import Config
from layerwise.data.open import open_data
from layerwise.engines.run import run
from layerwise.errors import BudgetError
from layerwise.memory.plan import ROOMS, MemoryPlan
from layerwise.nets import shortest_sample
from layerwise.nets.network import Network
from layerwise.run_store import StageRecord
from layerwise.stop import StopFlag
from layerwise.training.budget import (
    allowed_plans,
    fit_stage,
    fit_to_budget,
    plans_by_cost,
    smallest_budget,
    smallest_plan,
)
from layerwise.training.cache_plan import CachePlan
from layerwise.training.cut import cut_network
from layerwise.training.inference_peak import caching_peak
from layerwise.training.spec import StageSpec
from layerwise.training.training_peak import training_peak

CPU = torch.device("cpu")
Planned = Callable[..., tuple[Config, list[StageSpec]]]
NETWORKS: dict[str, tuple[str, dict[str, object]]] = {
    "convolutions": ("speech", {"net.width": 32, "net.context": 0}),
    "convolutions and a GRU": ("speech", {"net.width": 32, "net.context": 32}),
    "pictures": ("vision", {"net.width": 8, "net.blocks": [1, 1], "training.batch_size": 4}),
}
"""Wide enough for tensors to outweigh the accidents of a draw."""


@dataclass(frozen=True)
class Ran:
    """A run that was really trained, and what was planned for it."""

    config: Config
    specs: list[StageSpec]
    plans: list[MemoryPlan]
    records: list[StageRecord]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """--data for each kind of network.

    Some recordings are streamed when they are cached, others share a padded batch; some are shorter than a window.
    """
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    (folder / "recordings").mkdir()
    for number in range(12):
        length = (7000, 7003, 1600, 1550)[number % 4]
        soundfile.write(folder / "recordings" / f"{number:02}.wav", 0.1 * rng.standard_normal(length), 8000)
    for kind in ("cat", "ship"):
        (folder / "pictures" / kind).mkdir(parents=True)
        for number in range(7):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / kind / f"{number}.png")
    return {"speech": f"speech:{folder / 'recordings'}", "vision": f"images:{folder / 'pictures'}"}


@pytest.fixture(scope="module")
def plan_real(
    sources: dict[str, str], planned_stages: Planned, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Config, list[StageSpec]]]:
    """plan_real(name, **options): configuration and stages of a run on these sources."""

    def plan(name: str, **options: object) -> tuple[Config, list[StageSpec]]:
        kind, net = NETWORKS[name]
        folder = tmp_path_factory.mktemp("run")
        places = {"data.source": sources[kind], "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
        short = {"training.max_epochs": 1, "cache.block": "32MiB"}
        config, _ = planned_stages(kind, **{**net, **places, **short, **options})
        return config, cut_network(config, open_data(config.data, shortest_sample(config)), CPU)

    return plan


@pytest.fixture(scope="module")
def train(plan_real: Callable[..., tuple[Config, list[StageSpec]]]) -> Iterator[Callable[..., Ran]]:
    """train(name, **options): a run of one epoch; the same one is trained once."""
    done: dict[tuple[object, ...], Ran] = {}

    def trained(name: str, **options: object) -> Ran:
        key = (name, *sorted(options.items()))
        if key not in done:
            config, specs = plan_real(name, **options)
            plans = fit_to_budget(config, specs, CachePlan((True,) * len(specs)), CPU, set(), StopFlag())
            with with_plans(specs):
                done[key] = Ran(config, specs, plans, run(config).state.stages)
        return done[key]

    yield trained
    done.clear()


@contextmanager
def with_plans(specs: list[StageSpec]) -> Iterator[None]:
    """A run would make the same specs again, and predict for each of them anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerwise.engines.run.cut_network", lambda *_: specs)
        yield


def with_budget(config: Config, budget: int) -> Config:
    return config.model_copy(update={"memory": config.memory.model_copy(update={"gpu_mem": budget})})


FORCED = {"memory.micro_batch": 1, "memory.recompute": "always", "memory.optimizer": "host"}
MEASURED: list[tuple[str, dict[str, object]]] = [
    ("convolutions and a GRU", {}),
    ("convolutions and a GRU", {"cache.dtype": "float32", "training.stages": 2, **FORCED}),
    ("convolutions", {"training.stages": 1}),
    ("convolutions", {"training.stages": 1, "memory.micro_batch": 1}),
    ("convolutions", {"training.stages": 2, "memory.recompute": "always", "cache.dtype": "bfloat16"}),
    ("convolutions", {"cache.dtype": "float32", "training.precision": "bfloat16"}),
    ("pictures", {"training.precision": "float16"}),
    ("pictures", {"cache.dtype": "float32", "memory.micro_batch": 3, "memory.optimizer": "host"}),
    ("pictures", {"training.stages": 2, "memory.recompute": "always", "memory.micro_batch": 1}),
]


@pytest.mark.parametrize(("name", "options"), MEASURED)
def test_the_predicted_training_peak_is_never_below_and_at_most_5_percent_above(
    train: Callable[..., Ran], name: str, options: dict[str, object]
) -> None:
    ran = train(name, **options)
    for spec, plan, record in zip(ran.specs, ran.plans, ran.records, strict=True):
        predicted = training_peak(ran.config, spec, plan).bytes
        assert 1 <= predicted / record.train_peak_bytes <= 1.05, f"stage {spec.stage}"


@pytest.mark.parametrize(("name", "options"), MEASURED)
def test_the_predicted_caching_peak_is_never_below_and_at_most_5_percent_above(
    train: Callable[..., Ran], name: str, options: dict[str, object]
) -> None:
    ran = train(name, **options)
    for spec, plan, record in zip(ran.specs, ran.plans, ran.records, strict=True):
        predicted = caching_peak(ran.config, spec, plan.piece)
        assert 1 <= predicted / record.cache_peak_bytes <= 1.05, f"stage {spec.stage}"


SWEPT: dict[str, dict[str, object]] = {
    "convolutions": {"training.stages": 3, "training.batch_size": 2},
    "pictures": {"training.stages": 2},
}


@pytest.fixture(scope="module", params=SWEPT)
def sweep(
    request: pytest.FixtureRequest,
    plan_real: Callable[..., tuple[Config, list[StageSpec]]],
    train: Callable[..., Ran],
) -> list[Ran]:
    """Runs without a budget, under one that is tight, and under the smallest that is enough."""
    options = {**SWEPT[request.param], "cache.dtype": "float32"}
    config, specs = plan_real(request.param, **options)
    small = max(smallest_budget(config, spec, CPU) for spec in specs)
    large = max(training_peak(config, spec, allowed_plans(config, spec)[0][0]).bytes for spec in specs)
    budgets = [small + (large - small) // 3, small]
    return [train(request.param, **options)] + [
        train(request.param, **options, **{"memory.gpu_mem": b}) for b in budgets
    ]


def test_a_smaller_budget_costs_time_and_never_accuracy(sweep: list[Ran]) -> None:
    plain, *limited = sweep
    for ran in limited:
        for record, expected in zip(ran.records, plain.records, strict=True):
            assert record.best_loss == pytest.approx(expected.best_loss, rel=1e-4)
            assert record.peak_bytes <= ran.config.memory.gpu_mem
    laid_out = {tuple(str(plan) for plan in ran.plans) for ran in sweep}
    assert len(laid_out) == 3  # the budgets did make a difference


def test_under_a_budget_predictions_are_as_close(sweep: list[Ran]) -> None:
    for ran in sweep:
        for spec, plan, record in zip(ran.specs, ran.plans, ran.records, strict=True):
            training = training_peak(ran.config, spec, plan).bytes
            caching = caching_peak(ran.config, spec, plan.piece)
            assert 1 <= training / record.train_peak_bytes <= 1.05, f"stage {spec.stage}, {plan}"
            assert 1 <= caching / record.cache_peak_bytes <= 1.05, f"stage {spec.stage}, pieces of {plan.piece}"
            # Predicted to fit, it did: nothing had to be made smaller on the way.
            assert record.micro_batch == plan.micro_batch


def test_one_byte_below_the_smallest_budget_is_refused_with_a_sentence_that_names_it(sweep: list[Ran]) -> None:
    # That it is enough was tried by training in it.
    ran = sweep[-1]
    small = ran.config.memory.gpu_mem
    neediest = max(ran.specs, key=lambda spec: smallest_budget(ran.config, spec, CPU))
    assert smallest_budget(ran.config, neediest, CPU) == small
    below = with_budget(ran.config, small - 1)
    assert fit_stage(below, neediest, CPU) is None
    with pytest.raises(BudgetError, match=rf"too small: stage {neediest.stage} needs [\d.]+ MB even as") as refused:
        fit_to_budget(below, ran.specs, CachePlan((True,) * len(ran.specs)), CPU, set(), StopFlag())
    named = float(str(refused.value).partition("needs ")[2].split()[0])
    assert small <= round(named * 1e6) <= small + 10_000
    elsewhere = f"{ran.config.out}-refused"
    with with_plans(ran.specs), pytest.raises(BudgetError, match="Give at least that"):
        run(below.model_copy(update={"out": elsewhere}))
    assert not Path(elsewhere).exists()


@pytest.fixture(scope="module", params=["speech", "vision"])
def two_layers(request: pytest.FixtureRequest, planned_stages: Planned) -> Iterator[tuple[Config, StageSpec]]:
    """A stage of two layers, and all choices open; of the rooms of the loss two, for each holds more than a step takes."""
    options = {
        "speech": {"training.batch_size": 2, "net.context": 0, "net.kernels": [10, 8], "objective.steps": 2}
        | {"net.strides": [5, 4], "net.paddings": [2, 2]},
        "vision": {"training.batch_size": 2, "net.blocks": [1, 1], "objective.steps": 2},
    }
    shared = {"training.stages": 1, "memory.flops_per_byte": 16}
    config, (spec,) = planned_stages(request.param, **options[request.param], **shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerwise.memory.plan.ROOMS", (ROOMS[0], ROOMS[-1]))
        yield config, spec


def test_the_layout_is_the_cheapest_that_the_budget_holds_and_says_why(two_layers: tuple[Config, StageSpec]) -> None:
    config, spec = two_layers
    every = [each for family in plans_by_cost(config, spec, 16) for each in family]
    peaks = {each: training_peak(config, spec, each).bytes for each in every}
    least = smallest_budget(config, spec, CPU)
    for part in (0, 0.3, 0.8, 1):
        budget = least + int(part * (peaks[every[0]] - least))
        plan = fit_stage(with_budget(config, budget), spec, CPU)
        assert plan == next(each for each in every if peaks[each] <= budget)
        assert caching_peak(config, spec, plan.piece) <= budget
        assert (plan.why == "") == (plan == every[0])
        if part == 0:
            assert "the cheapest way (whole batch) would take" in plan.why


def test_a_larger_micro_batch_never_takes_less(two_layers: tuple[Config, StageSpec]) -> None:
    config, spec = two_layers
    for family in allowed_plans(config, spec):
        peaks = [training_peak(config, spec, each).bytes for each in family]
        assert peaks == sorted(peaks, reverse=True)


def test_no_layout_takes_less_than_the_smallest(two_layers: tuple[Config, StageSpec]) -> None:
    config, spec = two_layers
    least = training_peak(config, spec, smallest_plan(config, spec)).bytes
    every = [each for family in allowed_plans(config, spec) for each in family]
    assert least == min(training_peak(config, spec, each).bytes for each in every)


def test_without_a_budget_everything_is_laid_out_in_the_cheapest_way(planned_stages: Planned) -> None:
    for kind in ("speech", "vision"):
        config, specs = planned_stages(kind)
        for spec in specs:
            plan = fit_stage(config, spec, CPU)
            assert plan.whole
            assert not plan.recompute
            assert not plan.optimizer_on_host
            assert plan.why == ""


def test_a_prediction_is_split_into_kinds(planned_stages: Planned) -> None:
    config, specs = planned_stages("speech", **{"net.width": 16})
    for spec in specs:
        peak = training_peak(config, spec, allowed_plans(config, spec)[0][0])
        assert sum(peak.by_kind.values()) == peak.bytes
        predictors = 3 * spec.target_channels * spec.output_shape[0]
        assert peak.by_kind["parameters"] == 4 * (spec.parameters + predictors)
        assert peak.by_kind["optimizer"] >= 2 * peak.by_kind["parameters"]


def test_predicting_needs_no_memory_of_the_size_that_it_predicts(planned_stages: Planned) -> None:
    config, specs = planned_stages("speech", **{"net.width": 4096, "net.context": 0, "training.batch_size": 64})
    predicted = training_peak(config, specs[1], allowed_plans(config, specs[1])[0][0])
    assert predicted.bytes > 2 * 10**9


def test_a_stage_of_a_given_network_is_predicted_too(planned_stages: Planned) -> None:
    config, specs = planned_stages("vision")
    same = Network(specs[0].network.layers, specs[0].network.natural_cut)
    again = planned_stages("vision", same)[1]
    for one, other in zip(specs, again, strict=True):
        each = allowed_plans(config, one)[0][0]
        assert training_peak(config, one, each) == training_peak(config, other, each)

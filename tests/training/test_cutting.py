"""Where a network is cut, and into how many stages."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerwise.config import Config, resolve
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.engines.run import run
from layerwise.errors import BudgetError, ConfigError, Interrupted
from layerwise.events import Event, StepDone
from layerwise.nets import build_network, shortest_sample
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network
from layerwise.run_store import RunState
from layerwise.stop import StopFlag
from layerwise.training.budget import allowed_plans, fit_stage, held_at_all, smallest_budget
from layerwise.training.cut import LayerCost, StagesOf, _costs, cut_network, partition, stage_cost
from layerwise.training.spec import StageSpec, stage_specs
from layerwise.training.training_peak import training_peak

CPU = torch.device("cpu")
Tiny = Callable[..., Config]
Planned = Callable[..., tuple[Config, list[StageSpec]]]

# Predictions run on fake tensors, so these may have the widths of the paper.
SPEECH = {"net.width": 512, "net.context": 0}
PICTURES = {"net.width": 16, "net.blocks": [1, 2, 2], "training.batch_size": 4}


@dataclass(frozen=True, eq=False)
class Case:
    """A network of real size, without data."""

    config: Config
    data: DataSet
    network: Network

    @cached_property
    def costs(self) -> list[LayerCost]:
        """They depend neither on the number of stages nor on the budget."""
        return _costs(self.config, partial(stage_specs, self.config, self.data, self.network), range(self.layers))

    @property
    def layers(self) -> int:
        return len(self.network.layers)

    def with_options(self, stages: int | str | None = None, budget: int | None = None) -> Config:
        training = self.config.training.model_copy(update={"stages": stages})
        memory = self.config.memory.model_copy(update={"gpu_mem": budget})
        return self.config.model_copy(update={"training": training, "memory": memory})

    def cut(self, stages: int | str | None = None, budget: int | None = None) -> list[StageSpec]:
        def known(config: Config, stages_of: StagesOf, layers: range) -> list[LayerCost]:
            return self.costs[layers.start : layers.stop]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("layerwise.training.cut._costs", known)
            return cut_network(self.with_options(stages, budget), self.data, CPU, self.network)

    def stage(self, layers: range) -> StageSpec:
        """The stage of these layers, whatever the cut around it."""
        around = (range(layers.start), layers, range(layers.stop, self.layers))
        specs = stage_specs(self.config, self.data, self.network, [part for part in around if part])
        return next(spec for spec in specs if spec.layers == layers)


@pytest.fixture(scope="module")
def case(noise_data: Callable[[Config], DataSet]) -> Callable[..., Case]:
    """case(recipe, **{"dotted.key": value})"""

    @cache
    def make(recipe: str, changes: tuple[tuple[str, object], ...]) -> Case:
        config = resolve(recipe, overrides=dict(changes))
        data = noise_data(config)
        return Case(config, data, build_network(config.net, data.frame_shape))

    return lambda recipe, **changes: make(
        recipe, tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in changes.items())
    )


def every_cut(layers: int, stages: int) -> list[list[range]]:
    return [
        [range(start, stop) for start, stop in pairwise([0, *cuts, layers])]
        for cuts in combinations(range(1, layers), stages - 1)
    ]


def ranges_of(specs: list[StageSpec]) -> list[range]:
    return [spec.layers for spec in specs]


@pytest.mark.parametrize(("kind", "sizes"), [("speech", [1, 1, 1, 1]), ("vision", [1, 2, 1])])
def test_without_a_number_the_cut_is_the_natural_one_under_a_budget_that_holds_it_too(
    planned_stages: Planned, kind: str, sizes: list[int]
) -> None:
    number, budget = {"training.stages": len(sizes)}, {"memory.gpu_mem": "50MB"}
    for options in ({}, number, budget, number | budget):
        assert [len(spec.layers) for spec in planned_stages(kind, **options)[1]] == sizes


@pytest.mark.parametrize("kind", ["speech", "vision"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_number_of_stages_is_kept_and_all_layers_are_there(planned_stages: Planned, kind: str, stages: int) -> None:
    specs = planned_stages(kind, **{"training.stages": stages})[1]
    assert [spec.stage for spec in specs] == list(range(1, stages + 1))
    assert [layer for spec in specs for layer in spec.layers] == [0, 1, 2, 3]
    for below, above in pairwise(specs):
        assert above.frame_shape == below.output_shape
        assert (above.lengths == below.output_lengths).all()


@pytest.mark.parametrize(("recipe", "most"), [("librispeech", 6), ("stl10", 13)])
def test_more_stages_than_layers_are_refused_with_the_largest_number(
    case: Callable[..., Case], recipe: str, most: int
) -> None:
    with pytest.raises(ConfigError, match=f"--stages {most + 1}: .* at most {most} stages.* from 1 to {most}"):
        case(recipe).cut(most + 1)


def test_too_many_stages_of_a_given_network_name_what_forbids_them(planned_stages: Planned) -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.second(x) + x

    network = traced_network(Across(), (3, 8, 8))
    assert len(planned_stages("vision", network, **{"training.stages": 2})[1]) == 2
    with pytest.raises(ConfigError, match="at most 2 stages"):
        planned_stages("vision", network, **{"training.stages": 3})


@pytest.mark.parametrize(("recipe", "changes"), [("librispeech", SPEECH), ("stl10", PICTURES)])
def test_no_cut_has_a_smaller_largest_estimate(
    case: Callable[..., Case], recipe: str, changes: dict[str, object]
) -> None:
    made = case(recipe, **changes)

    def largest(cut: list[range]) -> int:
        return max(stage_cost(made.costs[layers.start : layers.stop]) for layers in cut)

    natural = len(made.network.natural_cut)
    for stages in range(1, made.layers + 1):
        if stages != natural:
            chosen = ranges_of(made.cut(stages))
            assert largest(chosen) == min(map(largest, every_cut(made.layers, stages)))


@pytest.mark.parametrize(("recipe", "changes"), [("librispeech", SPEECH), ("stl10", PICTURES)])
def test_the_largest_predicted_peak_of_a_cut_is_within_5_percent_of_the_smallest_possible(
    case: Callable[..., Case], recipe: str, changes: dict[str, object]
) -> None:
    made = case(recipe, **changes)

    @cache
    def of_stage(start: int, stop: int) -> int:
        return cheapest_peak(made, range(start, stop))

    def peak(part: range) -> int:
        return of_stage(part.start, part.stop)

    natural = len(made.network.natural_cut)
    for stages in range(1, made.layers + 1):
        if stages != natural:
            chosen = ranges_of(made.cut(stages))
            best = min(every_cut(made.layers, stages), key=lambda cut: max(map(peak, cut)))
            assert max(map(peak, chosen)) <= 1.05 * max(map(peak, best)), (chosen, best)


def cheapest_peak(made: Case, layers: range) -> int:
    """Predicted bytes of a stage of these layers, laid out in the cheapest way."""
    spec = made.stage(layers)
    return training_peak(made.config, spec, allowed_plans(made.config, spec)[0][0]).bytes


ESTIMATED = {
    "speech, width 512": ("librispeech", SPEECH),
    "speech, width 128": ("librispeech", {**SPEECH, "net.width": 128}),
    "pictures, width 64": ("stl10", {"training.batch_size": 8, "net.blocks": [2, 2, 2]}),
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_estimate_of_a_single_layer_is_within_25_percent_of_its_predicted_peak(
    case: Callable[..., Case], name: str
) -> None:
    recipe, changes = ESTIMATED[name]
    made = case(recipe, **changes)
    ratios = [stage_cost([cost]) / cheapest_peak(made, range(i, i + 1)) for i, cost in enumerate(made.costs)]
    assert all(0.75 <= ratio <= 1.25 for ratio in ratios), [round(ratio, 2) for ratio in ratios]


TWO_LAYERS = {"net.kernels": [10, 8], "net.strides": [5, 4], "net.paddings": [2, 2]}
ON_DEVICE = {"memory.optimizer": "device", "memory.recompute": "never", "training.batch_size": 2}
SMALL = {
    "speech": (
        "librispeech",
        {"net.width": 64, "net.context": 0, "net.kernels": [10, 8, 4], "net.strides": [5, 4, 2]}
        | {"net.paddings": [2, 2, 1], "data.window": 4096, **ON_DEVICE},
    ),
    "pictures": ("stl10", {"net.width": 16, "net.blocks": [1, 1, 1], **ON_DEVICE}),
}
"""Three layers each, so that every cut can be looked at under every budget."""


def is_held(made: Case, budget: int, cut: list[range]) -> bool:
    """Whether the budget holds each stage of a cut under any plan."""
    return all(least(made, layers) <= budget for layers in cut)


@cache
def least(made: Case, layers: range) -> int:
    """The smallest budget of a stage of these layers."""
    return smallest_budget(made.config, made.stage(layers), CPU)


@pytest.mark.parametrize(
    ("name", "part"),
    [("speech", 0), ("speech", 0.4), ("speech", 1), ("pictures", 0), ("pictures", 0.3), ("pictures", 1)],
)
def test_the_fewest_stages_are_the_fewest_that_the_budget_holds(
    case: Callable[..., Case], name: str, part: float
) -> None:
    recipe, changes = SMALL[name]
    made = case(recipe, **changes)
    small = max(least(made, range(layer, layer + 1)) for layer in range(made.layers))
    budget = small + int(part * (least(made, range(made.layers)) - small))
    specs = made.cut("fewest", budget)
    chosen = ranges_of(specs)
    assert is_held(made, budget, chosen)
    assert all(fit_stage(made.with_options("fewest", budget), spec, CPU) for spec in specs)
    for fewer in range(1, len(chosen)):
        assert not any(is_held(made, budget, cut) for cut in every_cut(made.layers, fewer))
    if part == 1:
        assert len(chosen) == 1


def test_without_a_budget_the_fewest_stages_are_one(planned_stages: Planned) -> None:
    for kind in ("speech", "vision"):
        assert ranges_of(planned_stages(kind, **{"training.stages": "fewest"})[1]) == [range(4)]


@pytest.mark.parametrize(("name", "sizes"), [("speech", (2, 1)), ("pictures", (3,))])
def test_under_a_budget_only_stages_that_it_does_not_hold_are_cut_further(
    case: Callable[..., Case], name: str, sizes: tuple[int, ...]
) -> None:
    recipe, changes = SMALL[name]
    made = case(recipe, **changes)
    made = replace(made, network=replace(made.network, natural_cut=sizes))
    natural = made.network.natural_ranges
    largest = max(natural, key=len)
    assert ranges_of(made.cut(budget=max(least(made, layers) for layers in natural))) == natural
    budget = least(made, largest) - 1
    found = ranges_of(made.cut(budget=budget))
    assert [part for part in found if part not in natural] == halves_of(made, largest)
    assert [part for part in found if part in natural] == [part for part in natural if part != largest]
    assert ranges_of(made.cut(len(natural), budget)) == natural  # a number that is asked for is kept


def halves_of(made: Case, layers: range) -> list[range]:
    """The two parts of a range whose largest estimate is the smallest."""
    halves = ([range(layers.start, at), range(at, layers.stop)] for at in range(layers.start + 1, layers.stop))
    return min(halves, key=lambda cut: max(stage_cost(made.costs[part.start : part.stop]) for part in cut))


@pytest.mark.parametrize("stages", [None, "fewest"])
def test_where_nothing_is_held_the_finest_cut_is_taken(planned_stages: Planned, stages: str | None) -> None:
    options = {
        **TWO_LAYERS,
        "net.context": 0,
        "memory.gpu_mem": "1kB",
        "training.batch_size": 1,
        "training.stages": stages,
    }
    config, specs = planned_stages("speech", **options)
    assert ranges_of(specs) == [range(1), range(1, 2)]
    for spec in specs:
        assert fit_stage(config, spec, CPU) is None
        assert not held_at_all(config, spec, CPU)


def test_all_at_once_the_parts_are_the_stages_of_the_given_cut(case: Callable[..., Case]) -> None:
    recipe, changes = SMALL["speech"]
    made = case(recipe, **changes)
    training = made.config.training.model_copy(update={"schedule": "simultaneous"})
    config = made.config.model_copy(update={"training": training})
    sizes = [made.layers - 1, 1]
    (whole,) = cut_network(config, made.data, CPU, made.network, sizes)
    assert ranges_of([whole]) == [range(made.layers)]
    assert ranges_of(list(whole.parts)) == [range(made.layers - 1), range(made.layers - 1, made.layers)]


def test_a_resume_with_another_budget_keeps_the_cut(tiny_speech: Tiny, write_tone: Callable[..., Path]) -> None:
    for number in range(8):
        folder = write_tone(f"recordings/{number}.wav").parent

    def config(budget: int | None) -> Config:
        options = {"training.max_epochs": 1, "net.width": 32, "net.context": 0, "training.batch_size": 2}
        options |= {"cache.block": "32MiB", "training.stages": "fewest", "memory.micro_batch": 2, **TWO_LAYERS}
        return tiny_speech(f"speech:{folder}", **options, **({"memory.gpu_mem": budget} if budget else {}))

    unlimited = config(None)
    (whole,) = cut_network(unlimited, open_data(unlimited.data, shortest_sample(unlimited)), CPU)
    too_small = config(smallest_budget(unlimited, whole, CPU) - 1)
    stop = StopFlag()

    def stop_at_the_first_step(event: Event) -> None:
        if isinstance(event, StepDone):
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(too_small, stop=stop, notify=stop_at_the_first_step)
    cut = RunState.load(Path(too_small.out) / "run.json").cut
    assert cut == [1, 1]
    result = run(unlimited)
    assert result.state.cut == cut
    assert [record.status for record in result.state.stages] == ["done"] * len(cut)
    # Begun under the other budget it would have been cut otherwise.
    afresh = unlimited.model_copy(update={"out": f"{unlimited.out}-afresh"})
    assert run(afresh).state.cut == [2]
    # And what was begun in one stage is not cut by a budget that does not hold it.
    with pytest.raises(BudgetError, match="stage 1 needs"):
        run(afresh.model_copy(update={"memory": too_small.memory}), from_stage=1)


@st.composite
def priced_ranges(draw: st.DrawFn) -> tuple[dict[tuple[int, int], int], int, int]:
    """Any price for each range (few different ones, so that there are ties), the number of units and of parts."""
    units = draw(st.integers(1, 7))
    prices = {(start, stop): draw(st.integers(-2, 6)) for start in range(units) for stop in range(start + 1, units + 1)}
    return prices, units, draw(st.integers(1, units))


@given(priced_ranges())
def test_no_partition_has_a_smaller_largest_cost_nor_at_that_a_smaller_sum(
    example: tuple[dict[tuple[int, int], int], int, int],
) -> None:
    prices, units, parts = example

    def largest_and_sum(ranges: list[range]) -> tuple[int, int]:
        costs = [prices[part.start, part.stop] for part in ranges]
        return max(costs), sum(costs)

    found = partition(lambda start, stop: prices[start, stop], units, parts)
    assert found in every_cut(units, parts)
    assert largest_and_sum(found) == min(map(largest_and_sum, every_cut(units, parts)))


def test_equal_units_are_shared_out_evenly() -> None:
    assert partition(lambda start, stop: (stop - start) ** 2, 6, 3) == [range(2), range(2, 4), range(4, 6)]


def test_each_range_is_priced_at_most_once() -> None:
    priced = []
    partition(lambda start, stop: priced.append((start, stop)) or stop - start, 12, 5)
    assert len(priced) == len(set(priced))


@pytest.mark.parametrize(("units", "parts"), [(3, 4), (3, 0), (0, 1)])
def test_an_impossible_number_of_parts_is_refused(units: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"{units} units cannot be split into {parts} parts"):
        partition(lambda start, stop: 1, units, parts)

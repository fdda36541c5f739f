"""The order in which plans are tried, and which one is chosen."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.config.options import MemoryOptions
from layerwise.memory.plan import MemoryPlan, cheapest, families


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """What `families` is asked."""
    batch_size = draw(st.integers(1, 40))
    return {
        "batch_size": batch_size,
        "sliceable": draw(st.booleans()),
        "layers": draw(st.integers(1, 3)),
        "micro_batch": draw(st.none() | st.integers(1, batch_size)),
        "recompute": draw(st.sampled_from([None, False, True])),
        "on_host": draw(st.sampled_from([None, False, True])),
    }


@st.composite
def costs(draw: st.DrawFn) -> Callable[[MemoryPlan], int]:
    """A price that falls with the micro-batch, never rises with the passes or an optimizer on the host, and goes with the
    rest as it likes."""
    fixed = {(again, True): draw(st.integers(0, 50)) for again in (False, True)}
    fixed |= {(again, False): fixed[again, True] + draw(st.integers(0, 50)) for again in (False, True)}
    per_sample = {again: draw(st.integers(0, 10)) for again in (False, True)}
    per_pass = draw(st.integers(0, 100))

    def cost(plan: MemoryPlan) -> int:
        samples = min(plan.micro_batch, plan.batch_size)
        return (
            fixed[plan.recompute, plan.optimizer_on_host]
            + per_sample[plan.recompute] * samples
            + per_pass // plan.passes
        )

    return cost


def listed(asked: dict[str, Any]) -> list[list[MemoryPlan]]:
    memory = MemoryOptions(
        micro_batch=asked["micro_batch"],
        recompute={None: "auto", False: "never", True: "always"}[asked["recompute"]],
        optimizer={None: "auto", False: "device", True: "host"}[asked["on_host"]],
    )
    return list(families(asked["batch_size"], memory, sliceable=asked["sliceable"], layers=asked["layers"]))


@given(options())
def test_families_differ_in_the_micro_batch_alone_and_fall(asked: dict[str, Any]) -> None:
    for family in listed(asked):
        assert len({(p.batch_size, p.passes, p.recompute, p.optimizer_on_host) for p in family}) == 1
        sizes = [plan.micro_batch for plan in family]
        assert sizes == sorted(sizes, reverse=True)
        assert all(1 <= plan.micro_batch <= plan.batch_size for plan in family)
        assert all(1 <= plan.passes <= plan.batch_size for plan in family)


@given(options())
def test_no_plan_comes_twice_and_what_costs_most_comes_last(asked: dict[str, Any]) -> None:
    found = listed(asked)
    every = [plan for family in found for plan in family]
    assert len(set(every)) == len(every)
    order = [(family[0].passes, family[0].optimizer_on_host, family[0].recompute) for family in found]
    assert order == sorted(order)
    assert every[0].passes == 1


@given(options())
def test_what_the_options_fix_is_fixed(asked: dict[str, Any]) -> None:
    every = [plan for family in listed(asked) for plan in family]
    if asked["on_host"] is not None:
        assert {plan.optimizer_on_host for plan in every} == {asked["on_host"]}
    else:
        assert {plan.optimizer_on_host for plan in every} == {False, True}
    if asked["sliceable"] and asked["recompute"] is not None:
        assert {plan.recompute for plan in every} == {asked["recompute"]}
    if asked["sliceable"] and asked["micro_batch"]:
        assert {plan.micro_batch for plan in every} == {asked["micro_batch"]}
    if asked["recompute"] is None and asked["layers"] == 1:
        assert not any(plan.recompute for plan in every)


@given(options())
def test_open_choices_reach_from_the_whole_batch_to_one_sample_and_its_targets(asked: dict[str, Any]) -> None:
    every = [plan for family in listed(asked | {"micro_batch": None}) for plan in family]
    assert every[0].whole
    if asked["sliceable"]:
        assert every[-1].micro_batch == 1
        assert every[-1].passes == asked["batch_size"]
        assert every[-1].smaller() is None


@given(options())
def test_what_ties_samples_together_is_never_sliced(asked: dict[str, Any]) -> None:
    assert all(p.whole for family in listed(asked | {"sliceable": False}) for p in family)


@given(options(), costs(), st.integers(0, 250))
def test_the_chosen_one_is_the_largest_micro_batch_of_the_first_family_that_has_one_that_fits(
    asked: dict[str, Any], cost: Callable[[MemoryPlan], int], budget: int
) -> None:
    chosen = cheapest(iter(listed(asked)), lambda plan: cost(plan) <= budget)
    fitting = [plan for family in listed(asked) for plan in family if cost(plan) <= budget]
    assert chosen == (fitting[0] if fitting else None)


@given(options(), costs(), st.integers(0, 250))
def test_nothing_is_tried_twice(asked: dict[str, Any], cost: Callable[[MemoryPlan], int], budget: int) -> None:
    tried = []
    cheapest(iter(listed(asked)), lambda plan: tried.append(plan) or cost(plan) <= budget)
    assert len(tried) == len(set(tried))


@given(st.integers(1, 200), st.integers(1, 200))
def test_smaller_ends_and_each_one_holds_less(batch_size: int, micro_batch: int) -> None:
    plan: MemoryPlan | None = MemoryPlan(batch_size, min(micro_batch, batch_size))
    seen = []
    while plan is not None:
        seen.append(plan)
        assert len(seen) <= 2 * batch_size.bit_length() + 2
        plan = plan.smaller()
    for before, after in pairwise(seen):
        assert (after.micro_batch, -after.passes) < (before.micro_batch, -before.passes)
        assert after.recompute == before.recompute
    assert (seen[-1].micro_batch, seen[-1].passes) == (1, batch_size)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (MemoryPlan(8, 8), "whole batch"),
        (MemoryPlan(8, 2), "micro-batch 2"),
        (MemoryPlan(8, 1, 4, True, True), "micro-batch 1, 4 passes, activations recomputed, optimizer on the host"),
    ],
)
def test_a_plan_says_what_it_is(plan: MemoryPlan, words: str) -> None:
    assert str(plan) == words


def test_a_sliced_batch_gives_the_loss_less_room() -> None:
    assert MemoryPlan(8, 4).loss_room == MemoryPlan(8, 8, 2).loss_room < MemoryPlan(8, 8).loss_room

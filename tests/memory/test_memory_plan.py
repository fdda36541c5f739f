"""All plans that the options allow, and which one is chosen."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from operator import attrgetter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.config.options import MemoryOptions
from layerwise.memory.plan import ROOMS, ROOMS_OF_GPU, WIDE_ROOM, MemoryPlan, cheapest, families


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """What `families` is asked."""
    batch_size = draw(st.integers(1, 40))
    sliceable = draw(st.booleans())
    return {
        "batch_size": batch_size,
        "sliceable": sliceable,
        "repeatable": sliceable or draw(st.booleans()),
        "layers": draw(st.integers(1, 3)),
        "stacked": draw(st.sampled_from([0, 1, 3, 12])),
        "micro_batch": draw(st.none() | st.integers(1, batch_size)),
        "recompute": draw(st.sampled_from([None, False, True])),
        "on_host": draw(st.sampled_from([None, False, True])),
    }


@st.composite
def costs(draw: st.DrawFn) -> Callable[[MemoryPlan], int]:
    """A price that falls with the micro-batch, and never rises with what a plan saves otherwise; it goes with recomputing as
    it likes."""
    fixed = {again: draw(st.integers(0, 50)) for again in (False, True)}
    per_sample = {again: draw(st.integers(0, 10)) for again in (False, True)}
    on_device, not_at_once, rows, more_rows, per_predictor = (draw(st.integers(0, 50)) for _ in range(5))

    def cost(plan: MemoryPlan) -> int:
        return (
            fixed[plan.recompute]
            + per_sample[plan.recompute] * min(plan.micro_batch, plan.batch_size)
            + (0 if plan.optimizer_on_host else on_device)
            + (0 if plan.gradients_at_once else not_at_once)
            + (rows // plan.parts if plan.parts else rows + more_rows)
            + per_predictor * (plan.predictors or 12)
        )

    return cost


def listed(asked: dict[str, Any], wider: tuple[int, ...] = ()) -> list[list[MemoryPlan]]:
    memory = MemoryOptions(
        micro_batch=asked["micro_batch"],
        recompute={None: "auto", False: "never", True: "always"}[asked["recompute"]],
        optimizer={None: "auto", False: "device", True: "host"}[asked["on_host"]],
    )
    of_module = {name: asked[name] for name in ("sliceable", "repeatable", "layers", "stacked")}
    return [family for family in families(asked["batch_size"], memory, **of_module, wider=wider) if family]


def every_plan(asked: dict[str, Any]) -> list[MemoryPlan]:
    return [plan for family in listed(asked) for plan in family]


@given(options())
def test_families_differ_in_the_micro_batch_alone_and_fall(asked: dict[str, Any]) -> None:
    for family in listed(asked):
        assert len({replace(plan, micro_batch=1) for plan in family}) == 1
        assert len({plan.whole for plan in family}) == 1
        sizes = [plan.micro_batch for plan in family]
        assert sizes == sorted(sizes, reverse=True)
        assert all(1 <= plan.micro_batch <= plan.batch_size for plan in family)
        assert all(0 <= plan.parts <= plan.batch_size for plan in family)
        assert all(0 <= plan.predictors <= max(asked["stacked"] - 1, 0) for plan in family)


@given(options())
def test_no_plan_comes_twice(asked: dict[str, Any]) -> None:
    every = every_plan(asked)
    assert len(set(every)) == len(every)


@given(options())
def test_what_the_options_fix_is_fixed(asked: dict[str, Any]) -> None:
    every = every_plan(asked)
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
def test_open_choices_reach_from_the_whole_batch_to_one_sample_its_targets_and_one_predictor(
    asked: dict[str, Any],
) -> None:
    asked |= {"micro_batch": None, "recompute": None, "on_host": None}
    every, size = every_plan(asked), asked["batch_size"]
    cheapest_of_all = MemoryPlan(size, size)
    assert cheapest_of_all in every
    if asked["repeatable"]:
        not_again = [plan for plan in every if not plan.recompute]
        (least,) = [plan for plan in not_again if all(plan.takes_at_most(other) for other in not_again)]
        assert least.micro_batch == (1 if asked["sliceable"] else size)
        assert least.predictors == (1 if asked["stacked"] > 1 else 0)
        assert (least.parts, least.optimizer_on_host, least.gradients_at_once) == (size, True, True)


@given(options())
def test_what_needs_the_host_comes_with_it_and_every_combination_is_there(asked: dict[str, Any]) -> None:
    every = every_plan(asked | {"recompute": None, "on_host": None})
    assert all(plan.optimizer_on_host for plan in every if plan.predictors or plan.gradients_at_once)
    assert all(plan.parts for plan in every if plan.gradients_at_once)
    choices = attrgetter("micro_batch", "recompute", "predictors", "parts")
    with_host = {choices(plan) for plan in every if plan.optimizer_on_host}
    assert with_host == set(product(*map(set, zip(*map(choices, every), strict=True))))
    assert {choices(plan) for plan in every if plan.gradients_at_once} == {each for each in with_host if each[3]}
    assert {choices(plan) for plan in every if not plan.optimizer_on_host} == {
        each for each in with_host if not each[2]
    }


@given(options())
def test_what_ties_samples_together_is_never_sliced_and_streamed_where_it_can_be_repeated(
    asked: dict[str, Any],
) -> None:
    every = every_plan(asked | {"sliceable": False})
    assert {plan.micro_batch for plan in every} == {asked["batch_size"]}
    assert not any(plan.recompute for plan in every)
    assert any(plan.parts for plan in every) == asked["repeatable"]
    # The loss comes in parts all the same: only the module must see the whole batch.
    if asked["repeatable"]:
        assert {plan.parts for plan in every} >= {0, 1, asked["batch_size"]}


@given(options(), costs())
def test_what_takes_at_most_as_much_as_another_never_costs_more(
    asked: dict[str, Any], cost: Callable[[MemoryPlan], int]
) -> None:
    every = every_plan(asked)
    for one, other in product(every[::7], every[::5]):
        if one.takes_at_most(other):
            assert cost(one) <= cost(other)
    for plan in every:
        assert plan.takes_at_most(plan)
        assert not any(replace(plan, recompute=not plan.recompute).takes_at_most(other) for other in [plan])


@given(options(), costs(), st.integers(0, 400), st.randoms())
def test_the_chosen_one_is_the_largest_micro_batch_of_the_first_family_that_has_one_that_fits(
    asked: dict[str, Any], cost: Callable[[MemoryPlan], int], budget: int, random: Any
) -> None:
    in_any_order = listed(asked)
    random.shuffle(in_any_order)
    chosen = cheapest(in_any_order, lambda plan: cost(plan) <= budget)
    fitting = [plan for family in in_any_order for plan in family if cost(plan) <= budget]
    assert chosen == (fitting[0] if fitting else None)


@given(options(), costs(), st.integers(0, 400))
def test_nothing_is_tried_twice_nor_what_takes_at_least_as_much_as_what_was_refused(
    asked: dict[str, Any], cost: Callable[[MemoryPlan], int], budget: int
) -> None:
    every, tried = listed(asked), []
    cheapest(every, lambda plan: tried.append(plan) or cost(plan) <= budget)
    assert len(tried) == len(set(tried))
    refused: list[MemoryPlan] = []
    for first, last in ((family[0], family[-1]) for family in every):
        if first in tried:
            assert not any(other.takes_at_most(last) for other in refused)
        if last in tried and cost(last) > budget:
            refused.append(last)


@given(st.integers(1, 200), st.integers(1, 200))
def test_smaller_ends_and_each_one_holds_less(batch_size: int, micro_batch: int) -> None:
    plan: MemoryPlan | None = MemoryPlan(batch_size, min(micro_batch, batch_size))
    seen = []
    while plan is not None:
        seen.append(plan)
        assert len(seen) <= 2 * batch_size.bit_length() + 2
        plan = plan.smaller()
    for before, after in pairwise(seen):
        assert after.takes_at_most(before)
        assert (after.micro_batch, -after.parts) < (before.micro_batch, -before.parts)
    assert (seen[-1].micro_batch, seen[-1].parts) == (1, batch_size)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (MemoryPlan(8, 8), "whole batch"),
        (MemoryPlan(8, 2), "micro-batch 2"),
        (MemoryPlan(8, 8, parts=1), "whole batch, streamed"),
        (
            MemoryPlan(8, 8, optimizer_on_host=True, predictors=3),
            "whole batch, optimizer on the host, 3 predictors at a time",
        ),
        (
            MemoryPlan(8, 1, True, True, 1, 4, gradients_at_once=True),
            "micro-batch 1, activations recomputed, optimizer on the host, streamed in 4 parts, gradients to the host at once, "
            "1 predictor at a time",
        ),
    ],
)
def test_a_plan_says_what_it_is(plan: MemoryPlan, words: str) -> None:
    assert str(plan) == words


@given(options())
def test_the_loss_has_more_room_where_the_whole_batch_is_on_the_device_alone(asked: dict[str, Any]) -> None:
    for plan in every_plan(asked):
        assert plan.loss_room in (ROOMS if plan.whole and not plan.predictors else ROOMS[1:])
    assert list(ROOMS) == sorted(ROOMS, reverse=True)


@given(options())
def test_on_a_gpu_the_loss_of_a_whole_batch_may_have_more_room_and_gives_it_up_first(asked: dict[str, Any]) -> None:
    every = [plan for family in listed(asked, ROOMS_OF_GPU) for plan in family]
    assert [plan for plan in every if plan.loss_room <= WIDE_ROOM] == every_plan(asked)
    wide = [plan for plan in every if plan.loss_room > WIDE_ROOM]
    assert all(plan.at_once and not plan.predictors for plan in wide)
    assert {replace(plan, loss_room=WIDE_ROOM) for plan in wide} == {
        plan for plan in every if plan.loss_room == WIDE_ROOM
    }
    for plan in wide:
        smaller = plan.smaller()
        assert smaller is not None
        assert (smaller.micro_batch, smaller.parts) == (plan.micro_batch, plan.parts)
        assert not smaller.at_once

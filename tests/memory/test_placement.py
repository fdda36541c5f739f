"""The order in which layouts are tried, and which one is chosen."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.memory.plan import Placement, cheapest, families


@st.composite
def options(draw: st.DrawFn) -> dict[str, object]:
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
def costs(draw: st.DrawFn) -> Callable[[Placement], int]:
    """A price that falls with the micro-batch, never rises with the passes or an optimizer on the host, and goes with the
    rest as it likes."""
    fixed = {(again, True): draw(st.integers(0, 50)) for again in (False, True)}
    fixed |= {(again, False): fixed[again, True] + draw(st.integers(0, 50)) for again in (False, True)}
    per_sample = {again: draw(st.integers(0, 10)) for again in (False, True)}
    per_pass = draw(st.integers(0, 100))

    def cost(placement: Placement) -> int:
        samples = min(placement.micro_batch, placement.batch_size)
        return (
            fixed[placement.recompute, placement.optimizer_on_host]
            + per_sample[placement.recompute] * samples
            + per_pass // placement.passes
        )

    return cost


def listed(asked: dict[str, object]) -> list[list[Placement]]:
    return list(families(**asked))


@given(options())
def test_families_differ_in_the_micro_batch_alone_and_fall(asked: dict[str, object]) -> None:
    for family in listed(asked):
        assert len({(p.batch_size, p.passes, p.recompute, p.optimizer_on_host) for p in family}) == 1
        sizes = [placement.micro_batch for placement in family]
        assert sizes == sorted(sizes, reverse=True)
        assert all(1 <= placement.micro_batch <= placement.batch_size for placement in family)
        assert all(1 <= placement.passes <= placement.batch_size for placement in family)


@given(options())
def test_no_placement_comes_twice_and_what_costs_most_comes_last(asked: dict[str, object]) -> None:
    found = listed(asked)
    every = [placement for family in found for placement in family]
    assert len(set(every)) == len(every)
    order = [(family[0].passes, family[0].optimizer_on_host, family[0].recompute) for family in found]
    assert order == sorted(order)
    assert every[0].passes == 1


@given(options())
def test_what_the_options_fix_is_fixed(asked: dict[str, object]) -> None:
    every = [placement for family in listed(asked) for placement in family]
    if asked["on_host"] is not None:
        assert {placement.optimizer_on_host for placement in every} == {asked["on_host"]}
    else:
        assert {placement.optimizer_on_host for placement in every} == {False, True}
    if asked["sliceable"] and asked["recompute"] is not None:
        assert {placement.recompute for placement in every} == {asked["recompute"]}
    if asked["sliceable"] and asked["micro_batch"]:
        assert {placement.micro_batch for placement in every} == {asked["micro_batch"]}
    if asked["recompute"] is None and asked["layers"] == 1:
        assert not any(placement.recompute for placement in every)


@given(options())
def test_open_choices_reach_from_the_whole_batch_to_one_sample_and_its_targets(asked: dict[str, object]) -> None:
    every = [placement for family in listed(asked | {"micro_batch": None}) for placement in family]
    assert every[0].whole
    if asked["sliceable"]:
        assert every[-1].micro_batch == 1
        assert every[-1].passes == asked["batch_size"]
        assert every[-1].smaller() is None


@given(options())
def test_what_ties_samples_together_is_never_sliced(asked: dict[str, object]) -> None:
    assert all(p.whole for family in listed(asked | {"sliceable": False}) for p in family)


@given(options(), costs(), st.integers(0, 250))
def test_the_chosen_one_is_the_largest_micro_batch_of_the_first_family_that_has_one_that_fits(
    asked: dict[str, object], cost: Callable[[Placement], int], budget: int
) -> None:
    chosen = cheapest(iter(listed(asked)), lambda placement: cost(placement) <= budget)
    fitting = [placement for family in listed(asked) for placement in family if cost(placement) <= budget]
    assert chosen == (fitting[0] if fitting else None)


@given(options(), costs(), st.integers(0, 250))
def test_nothing_is_tried_twice(asked: dict[str, object], cost: Callable[[Placement], int], budget: int) -> None:
    tried = []
    cheapest(iter(listed(asked)), lambda placement: tried.append(placement) or cost(placement) <= budget)
    assert len(tried) == len(set(tried))


@given(st.integers(1, 200), st.integers(1, 200))
def test_smaller_ends_and_each_one_holds_less(batch_size: int, micro_batch: int) -> None:
    placement: Placement | None = Placement(batch_size, min(micro_batch, batch_size))
    seen = []
    while placement is not None:
        seen.append(placement)
        assert len(seen) <= 2 * batch_size.bit_length() + 2
        placement = placement.smaller()
    for before, after in pairwise(seen):
        assert (after.micro_batch, -after.passes) < (before.micro_batch, -before.passes)
        assert after.recompute == before.recompute
    assert (seen[-1].micro_batch, seen[-1].passes) == (1, batch_size)


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (Placement(8, 8), "whole batch"),
        (Placement(8, 2), "micro-batch 2"),
        (Placement(8, 1, 4, True, True), "micro-batch 1, 4 passes, activations recomputed, optimizer on the host"),
    ],
)
def test_a_placement_says_what_it_is(placement: Placement, words: str) -> None:
    assert str(placement) == words


def test_a_sliced_batch_gives_the_loss_less_room() -> None:
    assert Placement(8, 4).loss_room == Placement(8, 8, 2).loss_room < Placement(8, 8).loss_room

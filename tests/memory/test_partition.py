"""Splitting units into parts whose most expensive one is as cheap as can be."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.training.cut import partition


def every_partition(units: int, parts: int) -> list[list[range]]:
    return [
        [range(start, stop) for start, stop in pairwise([0, *cuts, units])]
        for cuts in combinations(range(1, units), parts - 1)
    ]


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
    assert found in every_partition(units, parts)
    assert largest_and_sum(found) == min(map(largest_and_sum, every_partition(units, parts)))


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

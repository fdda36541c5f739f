"""Splits a row of units into consecutive parts so that the most expensive part is as cheap as can be."""

from collections.abc import Callable
from functools import cache


def partition(cost: Callable[[int, int], int], units: int, parts: int) -> list[range]:
    """Units 0 to units - 1 in exactly `parts` consecutive, non-empty ranges with the smallest possible largest cost.

    `cost(start, stop)` prices units start to stop - 1; it need not grow with the range, and each range is priced at
    most once. Among the splits with the smallest largest cost, one with the smallest sum of costs is taken.
    Raises ValueError where there are fewer units than parts, or no part is asked for.
    """
    if not 1 <= parts <= units:
        raise ValueError(f"{units} units cannot be split into {parts} parts: give a number from 1 to {units}.")
    price = cache(cost)
    largest = _smallest_largest_cost(price, units, parts)
    return _cheapest_split(price, units, parts, largest)


def _smallest_largest_cost(price: Callable[[int, int], int], units: int, parts: int) -> int:
    best = {stop: price(0, stop) for stop in range(1, units - parts + 2)}
    for part in range(2, parts + 1):
        best = {
            stop: min(max(best[start], price(start, stop)) for start in range(part - 1, stop))
            for stop in range(part, units - parts + part + 1)
        }
    return best[units]


def _cheapest_split(price: Callable[[int, int], int], units: int, parts: int, largest: int) -> list[range]:
    """The split with the smallest sum of costs among those whose every range costs `largest` at most."""
    totals = {0: 0}
    starts: list[dict[int, int]] = []
    for part in range(1, parts + 1):
        best = {}
        for stop in range(part, units - parts + part + 1):
            affordable = [start for start in totals if start < stop and price(start, stop) <= largest]
            if affordable:
                best[stop] = min((totals[start] + price(start, stop), start) for start in affordable)
        totals = {stop: total for stop, (total, _) in best.items()}
        starts.append({stop: start for stop, (_, start) in best.items()})
    ranges: list[range] = []
    stop = units
    for start_of in reversed(starts):
        ranges.insert(0, range(start_of[stop], stop))
        stop = start_of[stop]
    return ranges

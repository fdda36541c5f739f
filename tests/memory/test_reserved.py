"""What is reserved for steps follows from what they ask for and in which order."""

import pytest

from layerwise.memory.caching_allocator import BEYOND_CAP
from layerwise.memory.reserved import SPARE, Allocations, Segments

MiB = 2**20
FIXED, EXPANDABLE = Segments(expandable=False), Segments(expandable=True)


def asked(held: list[int], *steps: int) -> Allocations:
    """Of MiB that are held, and of numbers that follow: one more to hold, or, where it is negative, to let go of."""
    made = Allocations()
    for key, size in enumerate(held):
        made.made(-1 - key, size * MiB)
    made.begin_step()
    for size in steps:
        made.made(size, size * MiB) if size > 0 else made.gone(-size)
    return made


@pytest.mark.parametrize(
    ("allocations", "fixed", "expandable"),
    [
        (asked([], 1), 2, 2),
        (asked([], 5), 20, 20),
        (asked([30], 5, -5), 50, 40),
        (asked([30], 5, -5, 6, -6), 50, 40),
        (asked([11], 13, -13, 15, -15), 12 + 16, 40),
        (asked([11, 11], 12), 12 + 12 + 12, 40),
        (asked([], 11, 12, 13, -11, -13, 25), 26 + 26, 60),
        (asked([], 12, 13, -12, -13, 12, 14, 25), 12 + 14 + 26, 60),
    ],
)
def test_it_is_the_least_that_the_steps_go_through_with(allocations: Allocations, fixed: int, expandable: int) -> None:
    for segments, expected in ((FIXED, fixed * MiB), (EXPANDABLE, expandable * MiB)):
        fewest, least = allocations.fewest(segments), allocations.least(segments)
        assert expected <= fewest <= expected + (BEYOND_CAP if segments.expandable else 0)
        assert least == fewest + SPARE[segments.expandable]
        assert allocations.fit(least, segments)
        assert not allocations.fit(least - 2 * MiB, segments)


def test_workspaces_are_held_beside_it() -> None:
    assert asked([], 13).fewest(Segments(False, (8 * MiB, 8 * MiB))) == (20 + 14) * MiB


def test_what_was_let_go_of_before_the_step_takes_no_room_in_it() -> None:
    made = Allocations()
    made.made(1, 30 * MiB)
    made.gone(1)
    made.begin_step()
    made.made(2, 12 * MiB)
    assert made.fewest(FIXED) == 12 * MiB


def test_a_step_that_asks_for_twice_as_much_holds_the_same_all_the_time() -> None:
    assert asked([30], 11, -11, 13).scaled(2).fewest(FIXED) == (30 + 26) * MiB

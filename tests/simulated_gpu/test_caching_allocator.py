"""The model keeps to the rules of PyTorch's own allocator, in figures that PyTorch's own tests and source give."""

import random
from itertools import pairwise

import pytest
import torch
from counted_allocator import CountedAllocator

from layerwise.memory.caching_allocator import BEYOND_CAP, Block

MiB = 2**20
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MiB, 20 * MiB


def allocator(most: int = 2**40) -> CountedAllocator:
    return CountedAllocator(most)


@pytest.mark.parametrize(
    ("size", "blocks", "reserved"),
    [
        # The cases of test_graph_memory_stats_and_use_result_after_destroy_graph in PyTorch's test/test_cuda.py.
        (512, 1, SMALL_SEGMENT),
        (MiB, 2, SMALL_SEGMENT),
        (MiB, 3, 2 * SMALL_SEGMENT),
        (MiB + 512, 1, LARGE_SEGMENT),
        (10 * MiB - 512, 2, LARGE_SEGMENT),
        (10 * MiB - 512, 3, 2 * LARGE_SEGMENT),
        (10 * MiB, 3, 3 * 10 * MiB),
        (10 * MiB + 512, 3, 3 * 12 * MiB),
    ],
)
def test_segments_are_of_the_size_that_their_first_block_asks_for(size: int, blocks: int, reserved: int) -> None:
    made = allocator()
    held = [made.allocate(size) for _ in range(blocks)]
    assert made.figures.reserved_bytes.current == reserved
    assert len({block.address for block in held if block}) == blocks


@pytest.mark.parametrize(("asked", "given"), [(1, 512), (512, 512), (513, 1024), (MiB - 1, MiB), (5000, 5120)])
def test_sizes_are_rounded_to_512_bytes_and_both_are_told(asked: int, given: int) -> None:
    made = allocator()
    block = made.allocate(asked)
    assert (made.figures.allocated_bytes.current, made.figures.requested_bytes.current) == (given, asked)
    made.free(block)
    assert (made.figures.allocated_bytes.current, made.figures.requested_bytes.current) == (0, 0)
    assert made.figures.allocated_bytes.peak == given


def test_nothing_takes_no_block() -> None:
    made = allocator()
    assert made.allocate(0) is None
    made.free(None)
    assert made.figures.reserved_bytes.current == 0


def test_a_large_block_keeps_what_is_too_much_up_to_a_mebibyte() -> None:
    """should_split: of the large ones only what is left above 1 MiB is cut off."""
    whole, cut = allocator(), allocator()
    whole.allocate(19 * MiB - 512)  # a segment of its own, of 20 MiB
    assert whole.figures.reserved_bytes.current == whole.figures.allocated_bytes.current + 1 * MiB + 512
    kept = allocator()
    kept.allocate(13 * MiB)  # a segment of 14 MiB; what is left is not above 1 MiB
    assert kept.figures.allocated_bytes.current == kept.figures.reserved_bytes.current == 14 * MiB
    cut.allocate(2 * MiB)
    assert cut.figures.allocated_bytes.current == 2 * MiB


def test_the_smallest_block_that_is_large_enough_is_taken_and_of_these_the_first() -> None:
    made = allocator()
    blocks = [made.allocate(size) for size in (3 * MiB, 512 + MiB, 2 * MiB, 512 + MiB, 2 * MiB, 512 + MiB)]
    places = [block.address for block in blocks if block]
    for number in (4, 0, 2):
        made.free(blocks[number])
    taken = [made.allocate(2 * MiB) for _ in range(2)]
    assert [block.address for block in taken if block] == [places[2], places[4]]


def test_small_and_large_blocks_do_not_share_segments() -> None:
    made = allocator()
    made.free(made.allocate(5 * MiB))
    made.allocate(1000)
    assert made.figures.reserved_bytes.current == LARGE_SEGMENT + SMALL_SEGMENT


def test_free_neighbours_are_joined_and_a_segment_without_blocks_goes_back() -> None:
    made = allocator()
    blocks = [made.allocate(5 * MiB) for _ in range(4)]
    for number in (0, 2, 3, 1):
        made.release()
        assert made.figures.reserved_bytes.current == LARGE_SEGMENT
        made.free(blocks[number])
    assert made.figures.reserved_bytes.current == LARGE_SEGMENT
    again = made.allocate(8 * MiB)
    assert again is not None and again.address == 0
    made.free(again)
    made.release()
    assert made.figures.reserved_bytes.current == 0
    assert made.figures.reserved_bytes.peak == LARGE_SEGMENT


def test_a_cap_bounds_what_is_reserved_and_cached_segments_are_released_before_it_refuses() -> None:
    made = allocator()
    made.allowed = 32 * MiB
    cached = made.allocate(12 * MiB)
    made.free(cached)
    made.allocate(30 * MiB)
    assert (made.figures.num_alloc_retries, made.figures.num_ooms) == (1, 0)
    assert made.figures.reserved_bytes.current == 30 * MiB
    made.allocate(2 * MiB - 512 - MiB)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate"):
        made.allocate(2 * MiB)  # 20 MiB would be reserved for it
    assert (made.figures.num_alloc_retries, made.figures.num_ooms) == (2, 1)


def test_a_segment_in_use_cannot_be_released_however_little_of_it_is_used() -> None:
    made = allocator()
    made.allowed = 30 * MiB
    first, second = made.allocate(8 * MiB), made.allocate(8 * MiB)
    made.free(first)
    with pytest.raises(torch.OutOfMemoryError):
        made.allocate(12 * MiB)
    made.free(second)
    assert made.allocate(12 * MiB) is not None


def test_what_the_card_has_bounds_it_without_a_cap() -> None:
    made = allocator(most=100 * MiB)
    made.allocate(90 * MiB)
    with pytest.raises(torch.OutOfMemoryError):
        made.allocate(11 * MiB)


def test_peaks_begin_anew_from_what_is_held() -> None:
    made = allocator()
    small, large = made.allocate(1000), made.allocate(3 * MiB)
    made.free(large)
    made.reset_peak()
    assert made.figures.requested_bytes.peak == 1000
    assert made.figures.reserved_bytes.peak == SMALL_SEGMENT + LARGE_SEGMENT
    made.free(small)


def test_a_chosen_allocation_is_refused_once() -> None:
    made = allocator()
    made.refuse = lambda number: number == 2
    made.allocate(10)
    with pytest.raises(torch.OutOfMemoryError):
        made.allocate(10)
    assert made.allocate(10) is not None


def expandable(allowed: int = 2**40) -> CountedAllocator:
    made = allocator()
    made.expandable, made.allowed = True, allowed
    return made


def test_expandable_segments_grow_by_pages_and_hold_blocks_side_by_side() -> None:
    made = expandable()
    blocks = [made.allocate(size) for size in (11 * MiB, 11 * MiB, 19 * MiB, 512)]
    places = [block.address for block in blocks if block]
    assert places[1:3] == [places[0] + 11 * MiB, places[0] + 22 * MiB]
    assert made.reserved == 3 * LARGE_SEGMENT + SMALL_SEGMENT
    for block in blocks:
        made.free(block)
    again = made.allocate(41 * MiB)
    assert again is not None and again.address == places[0]


def test_what_is_free_at_the_end_of_an_expandable_segment_is_a_part_of_what_it_grows_to() -> None:
    made = expandable()
    first, second = made.allocate(15 * MiB), made.allocate(15 * MiB)
    made.free(second)
    grown = made.allocate(60 * MiB)
    assert first is not None and grown is not None and grown.address == first.address + 15 * MiB
    assert made.reserved == 4 * LARGE_SEGMENT


def test_pages_in_the_middle_of_an_expandable_segment_go_back_and_are_filled_again() -> None:
    made = expandable()
    first, middle, last = (made.allocate(size) for size in (20 * MiB, 40 * MiB, 20 * MiB))
    made.free(middle)
    made.release()
    assert made.reserved == 2 * LARGE_SEGMENT
    again = made.allocate(30 * MiB)
    assert first is not None and again is not None and again.address == first.address + 20 * MiB
    assert made.reserved == 4 * LARGE_SEGMENT
    assert last is not None


def test_a_cap_is_compared_in_units_though_expandable_segments_grow_in_pages() -> None:
    made = expandable(allowed=22 * MiB)
    made.allocate(22 * MiB)
    assert made.reserved == 2 * LARGE_SEGMENT <= made.allowed + BEYOND_CAP


@pytest.mark.parametrize("mode", [False, True], ids=["fixed", "expandable"])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_never_overlap_and_nothing_is_lost(seed: int, mode: bool) -> None:
    made, draw = allocator(), random.Random(seed)
    made.expandable = mode
    held: list[Block] = []
    for _ in range(2000):
        if held and draw.random() < 0.5:
            made.free(held.pop(draw.randrange(len(held))))
        else:
            block = made.allocate(int(2 ** draw.uniform(0, 25)))
            assert block is not None
            held.append(block)
        if draw.random() < 0.01:
            made.release()
    spans = sorted((block.address, block.address + block.size) for block in held)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert made.figures.allocated_bytes.current == sum(block.size for block in held)
    assert made.figures.requested_bytes.current == sum(block.requested for block in held)
    for block in held:
        made.free(block)
    made.release()
    assert {name: figure.current for name, figure in made.figures.each().items()} == dict.fromkeys(
        made.figures.each(), 0
    )

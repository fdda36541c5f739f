"""What CUDA's allocator reserves for a step: its blocks are asked of a model of the allocator, in the order of a rehearsal.

The driver shows what is reserved, and that is more than tensors ask for: sizes are rounded, segments are kept, and what is free
lies in pieces.
"""

from array import array
from dataclasses import dataclass

import torch

from layerwise.memory.caching_allocator import (
    BEYOND_CAP,
    LARGE_SEGMENT,
    SEGMENT_UNIT,
    UNLIMITED,
    CachingAllocator,
    up_to,
)

STEPS = 3
"""As often is a step taken: a later one finds in pieces what an earlier one has left free."""

SPARE = {False: SEGMENT_UNIT, True: LARGE_SEGMENT}
"""Bytes beyond what a rehearsed step goes through with, for segments of a fixed size and for expandable ones: other draws ask
for a little less or more, and may come to lie otherwise (`benchmarks/reserved.py`)."""


@dataclass(frozen=True, slots=True)
class Segments:
    """How a device reserves memory."""

    expandable: bool
    """Whether segments grow and shrink by pages, instead of being of the size that their first block asked for."""
    workspaces: tuple[int, ...] = ()
    """Bytes of each of those that cuBLAS holds all the time."""

    def allowed(self, room: int) -> int:
        """The cap under which no more than so many bytes are reserved."""
        return room - BEYOND_CAP if self.expandable else room


class Allocations:
    """What a step asks the allocator for, and when it lets go of it; and what is held all the time."""

    def __init__(self) -> None:
        self._events = array("q")
        """Bytes that are asked for; where something is let go of, its number among what was asked for, from -1 downwards."""
        self._count = 0
        self._numbers: dict[int, int] = {}
        self._start = self._count_at_start = 0
        self._fewest: dict[Segments, int] = {}

    def made(self, key: int, size: int) -> None:
        """Notes a storage, by whatever names it until it goes."""
        if size:
            self._numbers[key] = self._count
            self._events.append(size)
            self._count += 1

    def gone(self, key: int) -> None:
        """Notes that a storage is gone."""
        number = self._numbers.pop(key, None)
        if number is not None:
            self._events.append(-1 - number)

    def begin_step(self) -> None:
        """What is there now is held all the time; what comes is the step."""
        self._start, self._count_at_start = len(self._events), self._count

    def scaled(self, factor: float) -> "Allocations":
        """The same with a step that asks for so many times as much."""
        if factor == 1:
            return self
        twin = Allocations()
        start = self._start
        later = (max(round(event * factor), 1) if event > 0 else event for event in self._events[start:])
        twin._events = self._events[:start] + array("q", later)
        twin._count, twin._start, twin._count_at_start = self._count, start, self._count_at_start
        return twin

    def fit(self, room: int, segments: Segments) -> bool:
        """Whether such steps go through with at most so many bytes reserved, whatever is drawn."""
        known = self._fewest.get(segments)
        room -= SPARE[segments.expandable]
        return room == known or self._after(room, segments) is not None

    def least(self, segments: Segments) -> int:
        """The fewest bytes that have to be reserved for such steps, whatever is drawn."""
        return self.fewest(segments) + SPARE[segments.expandable]

    def fewest(self, segments: Segments) -> int:
        """The fewest bytes, in units of segments, that have to be reserved for just what was taken down."""
        if segments not in self._fewest:
            free = self._after(UNLIMITED, segments)
            assert free is not None
            refused = up_to(SEGMENT_UNIT, free.most_allocated) - SEGMENT_UNIT
            enough = free.most_reserved - segments.allowed(0)
            while enough - refused > SEGMENT_UNIT:
                middle = up_to(SEGMENT_UNIT, (refused + enough) // 2)
                if self._after(middle, segments) is not None:
                    enough = middle
                else:
                    refused = middle
            self._fewest[segments] = enough
        return self._fewest[segments]

    def _after(self, room: int, segments: Segments) -> CachingAllocator | None:
        """The allocator behind the steps; None where the room does not hold them."""
        allocator = CachingAllocator(segments.allowed(room), segments.expandable)
        try:
            self._ask(allocator, segments)
        except torch.OutOfMemoryError:
            return None
        return allocator

    def _ask(self, allocator: CachingAllocator, segments: Segments) -> None:
        for size in segments.workspaces:
            allocator.allocate(size)
        earlier, step = self._events[: self._start], self._events[self._start :]
        gone = {-1 - event for event in earlier if event < 0}
        for number, size in enumerate(event for event in earlier if event > 0):
            if number not in gone:
                allocator.allocate(size)
        for _ in range(STEPS):
            blocks, number = {}, self._count_at_start
            for event in step:
                if event > 0:
                    blocks[number] = allocator.allocate(event)
                    number += 1
                else:
                    allocator.free(blocks.pop(-1 - event, None))
            for block in blocks.values():
                allocator.free(block)

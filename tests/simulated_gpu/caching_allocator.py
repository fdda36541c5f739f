"""A model of PyTorch's CUDA caching allocator, in numbers alone; nothing of it needs a GPU.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.12) with its default settings and one stream. Not modelled:
private pools of CUDA graphs, other streams, and the settings max_split_size_mb, roundup_power2_divisions and
garbage_collection_threshold, which are off unless somebody sets them.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

SMALLEST_BLOCK = 512
"""Every size is rounded up to a multiple of it."""
LARGEST_SMALL = 2**20
"""Up to here a block comes from the pool of small ones, which has segments of its own."""
SMALL_SEGMENT = 2 * 2**20
LARGE_SEGMENT = 20 * 2**20
OWN_SEGMENT_FROM = 10 * 2**20
"""From here on a block that is not found has a segment of its size, in units of SEGMENT_UNIT."""
SEGMENT_UNIT = 2 * 2**20


def rounded(size: int) -> int:
    """Bytes of the block that holds so many bytes."""
    return max(_up_to(SMALLEST_BLOCK, size), SMALLEST_BLOCK)


def segment_bytes(size: int) -> int:
    """Bytes that the driver is asked for where no free block holds `size`."""
    if size <= LARGEST_SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < OWN_SEGMENT_FROM else _up_to(SEGMENT_UNIT, size)


def _up_to(unit: int, size: int) -> int:
    return -(-size // unit) * unit


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment; the parts of a segment know their neighbours."""

    address: int
    size: int
    small: bool
    requested: int = 0
    """Bytes that were asked for; 0 where the block is free."""
    before: "Block | None" = None
    after: "Block | None" = None

    @property
    def place(self) -> tuple[int, int]:
        """Free blocks are taken in this order."""
        return self.size, self.address


@dataclass(slots=True)
class Figure:
    """Bytes or pieces now, and the most since the peak was reset."""

    current: int = 0
    peak: int = 0

    def add(self, amount: int) -> None:
        """Takes away where the amount is negative."""
        self.current += amount
        self.peak = max(self.peak, self.current)


@dataclass(slots=True)
class Figures:
    """By the names that torch.cuda.memory_stats has for them."""

    allocated_bytes: Figure = field(default_factory=Figure)
    """Of blocks that are handed out, as they are rounded."""
    requested_bytes: Figure = field(default_factory=Figure)
    """Of the same, as they were asked for."""
    reserved_bytes: Figure = field(default_factory=Figure)
    """Of segments; with the context what the driver shows."""
    segment: Figure = field(default_factory=Figure)
    num_alloc_retries: int = 0
    num_ooms: int = 0

    def each(self) -> dict[str, Figure]:
        """The figures that have a peak."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if isinstance(value, Figure)}


class CachingAllocator:
    """Hands out blocks of segments. `most` bytes can be reserved at all; `allowed` may be, None: all of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.allowed: int | None = None
        self.figures = Figures()
        self.allocations = 0
        """Blocks that were asked for, refused ones too."""
        self.most_reserved = 0
        """The highest of figures.reserved_bytes; whoever watches the driver sets it to zero."""
        self.refuse: Callable[[int], bool] = lambda number: False
        """Whether to refuse this allocation, from 1, whatever room there is."""
        self._free: dict[bool, list[Block]] = {True: [], False: []}
        """Small ones and large ones, by size and then by address."""
        self._next_address = 0

    def allocate(self, size: int) -> Block | None:
        """A block for so many bytes, None for none. Raises torch.OutOfMemoryError where there is no room."""
        if size == 0:
            return None
        self.allocations += 1
        needed = rounded(size)
        block = None
        if not self.refuse(self.allocations):
            block = self._found(needed) or self._segment(needed) or self._segment_after_release(needed)
        if block is None:
            self.figures.num_ooms += 1
            raise torch.OutOfMemoryError(self._why_not(size))
        self._split(block, needed)
        block.requested = size
        self.figures.allocated_bytes.add(block.size)
        self.figures.requested_bytes.add(size)
        return block

    def free(self, block: Block | None) -> None:
        """Takes a block back, and joins it to free neighbours."""
        if block is None:
            return
        self.figures.allocated_bytes.add(-block.size)
        self.figures.requested_bytes.add(-block.requested)
        block.requested = 0
        for other in (block.before, block.after):
            if other is None or other.requested:
                continue
            self._take(other)
            if other is block.before:
                block.address, block.before = other.address, other.before
                if block.before is not None:
                    block.before.after = block
            else:
                block.after = other.after
                if block.after is not None:
                    block.after.before = block
            block.size += other.size
        insort(self._free[block.small], block, key=_place)

    def empty_cache(self) -> None:
        """Gives segments back to the driver of which no block is handed out."""
        for pool in self._free.values():
            for block in [block for block in pool if block.before is block.after is None]:
                self._take(block)
                self.figures.reserved_bytes.add(-block.size)
                self.figures.segment.add(-1)

    def reset_peak(self) -> None:
        """Starts new peaks from what there is now."""
        for figure in self.figures.each().values():
            figure.peak = figure.current

    def _found(self, needed: int) -> Block | None:
        """The smallest free block that is large enough, off its pool."""
        pool = self._free[needed <= LARGEST_SMALL]
        at = bisect_left(pool, (needed, 0), key=_place)
        return pool.pop(at) if at < len(pool) else None

    def _segment(self, needed: int) -> Block | None:
        """A new segment, or None where it is not to be had."""
        size = segment_bytes(needed)
        reserved = self.figures.reserved_bytes.current + size
        if reserved > self.most or (self.allowed is not None and reserved > self.allowed):
            return None
        self.figures.reserved_bytes.add(size)
        self.figures.segment.add(1)
        self.most_reserved = max(self.most_reserved, reserved)
        block = Block(self._next_address, size, needed <= LARGEST_SMALL)
        self._next_address += size
        return block

    def _segment_after_release(self, needed: int) -> Block | None:
        self.figures.num_alloc_retries += 1
        self.empty_cache()
        return self._segment(needed)

    def _split(self, block: Block, needed: int) -> None:
        """Cuts off what the block has too much, unless it is a large one and that is little."""
        left = block.size - needed
        if left < SMALLEST_BLOCK if block.small else left <= LARGEST_SMALL:
            return
        rest = Block(block.address + needed, left, block.small, before=block, after=block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.size, block.after = needed, rest
        insort(self._free[block.small], rest, key=_place)

    def _take(self, block: Block) -> None:
        """Off the pool of free ones."""
        pool = self._free[block.small]
        at = bisect_left(pool, block.place, key=_place)
        assert pool[at] is block
        del pool[at]

    def _why_not(self, size: int) -> str:
        held = self.figures
        return (
            f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
            f"{self.most / 2**20:.2f} MiB for this process, of which {self.allowed} bytes are allowed. Of the allocated memory "
            f"{held.allocated_bytes.current / 2**20:.2f} MiB is allocated by PyTorch, and "
            f"{(held.reserved_bytes.current - held.allocated_bytes.current) / 2**20:.2f} MiB is reserved by PyTorch but "
            "unallocated."
        )


def _place(block: Block) -> tuple[int, int]:
    return block.place

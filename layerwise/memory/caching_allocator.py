"""A model of PyTorch's CUDA caching allocator, in numbers alone: what it reserves of a device, which is what the driver shows.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.12), on one stream. Not modelled: private pools of CUDA
graphs, other streams, and the settings max_split_size_mb, roundup_power2_divisions and garbage_collection_threshold, which are
off unless somebody sets them.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import torch

SMALLEST_BLOCK = 512
"""Every size is rounded up to a multiple of it."""
LARGEST_SMALL = 2**20
"""Up to here a block comes from the pool of small ones, which has segments of its own."""
SMALL_SEGMENT = 2 * 2**20
LARGE_SEGMENT = 20 * 2**20
"""The two are also the pages in which expandable segments grow and shrink, small and large ones."""
OWN_SEGMENT_FROM = 10 * 2**20
"""From here on a block that is not found has a segment of its size, in units of SEGMENT_UNIT."""
SEGMENT_UNIT = 2 * 2**20

BEYOND_CAP = LARGE_SEGMENT - SEGMENT_UNIT
"""Bytes by which expandable segments may pass the cap: it is compared in units, and they grow in pages."""

ADDRESSES = 2**20 * LARGE_SEGMENT
"""Of an expandable segment; more than any device has memory."""

UNLIMITED = 2**62


def rounded(size: int) -> int:
    """Bytes of the block that holds so many bytes."""
    return max(up_to(SMALLEST_BLOCK, size), SMALLEST_BLOCK)


def segment_bytes(size: int) -> int:
    """Bytes that the driver is asked for where no free block holds `size`."""
    if size <= LARGEST_SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < OWN_SEGMENT_FROM else up_to(SEGMENT_UNIT, size)


def up_to(unit: int, size: int) -> int:
    """The next multiple of a unit."""
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
    expandable: bool = False
    mapped: bool = True
    """Whether there is memory behind the addresses; there is none where an expandable segment has not grown so far."""

    @property
    def grows_to(self) -> int:
        """Bytes that it could have."""
        return self.size + (self.after.size if self.after is not None and not self.after.mapped else 0)


class CachingAllocator:
    """Hands out blocks of segments. `allowed` bytes may be reserved; expandable: new segments grow and shrink by pages."""

    def __init__(self, allowed: int = UNLIMITED, expandable: bool = False) -> None:
        self.allowed, self.expandable = allowed, expandable
        self.allocated = self.most_allocated = 0
        """Bytes of blocks that are handed out, as they are rounded."""
        self.reserved = self.most_reserved = 0
        """Bytes of segments."""
        self.retries = 0
        """How often everything free was given back to the driver before a block could be had."""
        self._free: dict[bool, list[Block]] = {True: [], False: []}
        """Small ones and large ones, by size and then by address."""
        self._unmapped: dict[bool, list[Block]] = {True: [], False: []}
        """By address."""
        self._next_address = 0

    def allocate(self, size: int) -> Block | None:
        """A block for so many bytes, None for none. Raises torch.OutOfMemoryError where there is no room."""
        if size == 0:
            return None
        needed = rounded(size)
        block = self._found(needed) or self._reserve(needed)
        if block is None:
            self.retries += 1
            self.release()
            block = self._reserve(needed)
        if block is None:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. Of the {self.allowed / 2**20:.2f} MiB that are "
                f"allowed {self.allocated / 2**20:.2f} MiB is allocated by PyTorch, and "
                f"{(self.reserved - self.allocated) / 2**20:.2f} MiB is reserved by PyTorch but unallocated."
            )
        left = block.size - needed
        if left >= SMALLEST_BLOCK if block.small or self.expandable else left > LARGEST_SMALL:
            self._put(self._cut(block, needed))
        block.requested = size
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        """Takes a block back, and joins it to free neighbours."""
        if block is not None:
            self.allocated -= block.size
            block.requested = 0
            self._join(block)
            self._put(block)

    def release(self) -> None:
        """Gives segments back to the driver of which no block is handed out; of expandable ones all pages that are free."""
        for small in (False, True):
            for block in list(self._free[small]):
                if block.expandable:
                    self._unmap(block)
                elif block.before is block.after is None:
                    self._take(block)
                    self.reserved -= block.size

    def _found(self, needed: int) -> Block | None:
        """The smallest free block that is large enough, off its pool."""
        pool = self._free[needed <= LARGEST_SMALL]
        at = bisect_left(pool, (needed, 0), key=_by_size)
        if self.expandable:  # a block that could grow counts as large as it could become
            while at + 1 < len(pool) and pool[at].expandable and pool[at + 1].grows_to < pool[at].grows_to:
                at += 1
        else:
            while at < len(pool) and pool[at].expandable:
                at += 1
        return pool.pop(at) if at < len(pool) else None

    def _reserve(self, needed: int) -> Block | None:
        """A block of new memory, or None where it is not to be had."""
        size, small = segment_bytes(needed), needed <= LARGEST_SMALL
        if self.reserved + size > self.allowed:
            return None
        if self.expandable:
            return self._grown(needed, small)
        block = Block(self._next_address, size, small)
        self._next_address += size
        self._count(size)
        return block

    def _grown(self, needed: int, small: bool) -> Block:
        """At the lowest addresses that are free or not mapped, one after another."""
        block = next((first for first in self._open(small) if _free_from(first, needed)), None)
        if block is None:
            start = up_to(ADDRESSES, self._next_address)
            self._next_address = start + ADDRESSES
            block = Block(start, ADDRESSES, small, expandable=True, mapped=False)
            self._put(block)
        if not block.mapped:
            self._map(block, min(needed, block.size))
        while block.size < needed:
            assert block.after is not None
            missing, block = needed - block.size, block.after
            self._map(block, min(missing, block.size))
        self._take(block)
        return block

    def _open(self, small: bool) -> list[Block]:
        """Where segments may grow: unmapped blocks, or the free ones right before them."""
        return [
            block.before if block.before is not None and not block.before.requested else block
            for block in self._unmapped[small]
        ]

    def _map(self, block: Block, size: int) -> None:
        """Lets the first pages of an unmapped block, so that they hold `size`, be a free one."""
        self._take(block)
        block.mapped, pages = True, up_to(_page(block), size)
        if pages < block.size:
            rest = self._cut(block, pages)
            rest.mapped = False
            self._put(rest)
        self._count(pages)
        self._join(block)
        self._put(block)

    def _unmap(self, block: Block) -> None:
        """Gives the whole pages of a free block back."""
        page = _page(block)
        start, stop = up_to(page, block.address), (block.address + block.size) // page * page
        if start >= stop:
            return
        self._take(block)
        if block.address < start:
            front, block = block, self._cut(block, start - block.address)
            self._put(front)
        if stop < block.address + block.size:
            self._put(self._cut(block, stop - block.address))
        self._count(-block.size)
        block.mapped = False
        self._join(block)
        if block.before is not None or block.after is not None:  # else the segment is gone
            self._put(block)

    def _count(self, reserved: int) -> None:
        self.reserved += reserved
        self.most_reserved = max(self.most_reserved, self.reserved)

    def _cut(self, block: Block, size: int) -> Block:
        """Leaves so many bytes to the block, and gives the rest, in no pool."""
        rest = Block(
            block.address + size,
            block.size - size,
            block.small,
            before=block,
            after=block.after,
            expandable=block.expandable,
            mapped=block.mapped,
        )
        if rest.after is not None:
            rest.after.before = rest
        block.size, block.after = size, rest
        return rest

    def _join(self, block: Block) -> None:
        """Makes free neighbours of the same kind a part of the block, off their pools."""
        for other in (block.before, block.after):
            if other is None or other.requested or other.mapped != block.mapped:
                continue
            self._take(other)
            block.size += other.size
            if other is block.before:
                block.address, block.before = other.address, other.before
                if block.before is not None:
                    block.before.after = block
            else:
                block.after = other.after
                if block.after is not None:
                    block.after.before = block

    def _put(self, block: Block) -> None:
        if block.mapped:
            insort(self._free[block.small], block, key=_by_size)
        else:
            insort(self._unmapped[block.small], block, key=_by_address)

    def _take(self, block: Block) -> None:
        """Off its pool."""
        if block.mapped:
            pool, at = self._free[block.small], bisect_left(self._free[block.small], _by_size(block), key=_by_size)
        else:
            pool = self._unmapped[block.small]
            at = bisect_left(pool, block.address, key=_by_address)
        assert pool[at] is block
        del pool[at]


def _by_size(block: Block) -> tuple[int, int]:
    return block.size, block.address


def _by_address(block: Block) -> int:
    return block.address


def _page(block: Block) -> int:
    return SMALL_SEGMENT if block.small else LARGE_SEGMENT


def _free_from(block: Block | None, size: int) -> bool:
    """Whether so many bytes are free or not mapped from this block on."""
    while block is not None and not block.requested and size > 0:
        size, block = size - block.size, block.after
    return size <= 0

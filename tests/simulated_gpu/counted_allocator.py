"""The package's model of PyTorch's caching allocator, with the figures that torch.cuda.memory_stats gives."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from layerwise.memory.caching_allocator import Block, CachingAllocator
from layerwise.memory.reserved import Allocations


@dataclass(slots=True)
class Figure:
    """Bytes now, and the most since the peak was reset."""

    current: int = 0
    peak: int = 0

    def set(self, value: int) -> None:
        self.current, self.peak = value, max(self.peak, value)


@dataclass(slots=True)
class Figures:
    """By the names that torch.cuda.memory_stats has for them."""

    allocated_bytes: Figure = field(default_factory=Figure)
    """Of blocks that are handed out, as they are rounded."""
    requested_bytes: Figure = field(default_factory=Figure)
    """Of the same, as they were asked for."""
    reserved_bytes: Figure = field(default_factory=Figure)
    """Of segments; with the context what the driver shows."""
    num_alloc_retries: int = 0
    num_ooms: int = 0

    def each(self) -> dict[str, Figure]:
        """The figures that have a peak."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if isinstance(value, Figure)}


class CountedAllocator(CachingAllocator):
    """`most` bytes can be reserved at all. `most_reserved` is set to zero by whoever watches the driver."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.most = most
        self.figures = Figures()
        self.allocations = 0
        """Blocks that were asked for, refused ones too."""
        self.refuse: Callable[[int], bool] = lambda number: False
        """Whether to refuse this allocation, from 1, whatever room there is."""
        self.log: Allocations | None = None
        """Takes down what is asked for, where somebody wants to know."""

    def allocate(self, size: int) -> Block | None:
        if size == 0:
            return None
        self.allocations += 1
        try:
            if self.refuse(self.allocations):
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes, which is refused.")
            block = super().allocate(size)
        except torch.OutOfMemoryError:
            self.figures.num_ooms += 1
            raise
        finally:
            self._note(0)
        self._note(size)
        if self.log is not None:
            self.log.made(id(block), size)
        return block

    def free(self, block: Block | None) -> None:
        requested = 0 if block is None else block.requested
        if self.log is not None and block is not None:
            self.log.gone(id(block))
        super().free(block)
        self._note(-requested)

    def release(self) -> None:
        super().release()
        self._note(0)

    def reset_peak(self) -> None:
        """Starts new peaks from what there is now."""
        for figure in self.figures.each().values():
            figure.peak = figure.current

    def _note(self, requested: int) -> None:
        figures = self.figures
        figures.num_alloc_retries = self.retries
        figures.allocated_bytes.set(self.allocated)
        figures.reserved_bytes.set(self.reserved)
        figures.requested_bytes.set(figures.requested_bytes.current + requested)

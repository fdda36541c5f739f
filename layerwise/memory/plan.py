"""How a stage is laid out on the device, and in which order plans are tried: cheaper ones before dearer ones.

A plan does not change the result beyond rounding: a smaller budget costs time, never accuracy."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby, product

from layerwise.config.options import MemoryOptions

WIDE_ROOM = 12 * 2**20
NARROW_ROOM = 4 * 2**20
"""Bytes that the loss may take on top, where the whole batch is on the device and where it is not. Narrow slices read the
predictors more often: at width 512 on 2 cores the loss took about a quarter longer."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How one stage is laid out on the device. The cheapest plan is the whole batch in one pass, with everything there.

    The first five fields say how the stage trains; two plans are equal where these are.
    """

    batch_size: int
    micro_batch: int
    """Samples that are on the device at once."""
    passes: int = 1
    """Times that the batch is gone through, each time for a part of the targets."""
    recompute: bool = False
    """Whether layers keep only their input and run again in the backward pass (activation checkpointing)."""
    optimizer_on_host: bool = False
    """Whether the optimizer's state lies in host memory, and the step is taken there."""
    piece: int = field(default=0, compare=False)
    """Input frames that are on the device at once in the caching pass; 0 until it is planned."""
    windows: int = field(default=0, compare=False)
    """Windows of the input that are on the device at once while they are recomputed; 0 where a cache or data are read."""
    why: str = field(default="", compare=False)
    """Why the stage does not train in the cheapest way; empty where it does."""

    @property
    def whole(self) -> bool:
        """Whether the batch is not sliced."""
        return self.micro_batch >= self.batch_size and self.passes == 1

    @property
    def loss_room(self) -> int:
        """Bytes that the objective may take beside representations and gradients."""
        return WIDE_ROOM if self.whole else NARROW_ROOM

    def smaller(self) -> "MemoryPlan | None":
        """The next smaller slices, or None where one sample at a time and one sample's targets a pass are reached."""
        if self.micro_batch > 1:
            return replace(self, micro_batch=self.micro_batch // 2)
        if self.passes < self.batch_size:
            return replace(self, passes=min(2 * self.passes, self.batch_size))
        return None

    def __str__(self) -> str:
        words = [f"micro-batch {self.micro_batch}" if self.micro_batch < self.batch_size else "whole batch"]
        if self.passes > 1:
            words.append(f"{self.passes} passes")
        if self.recompute:
            words.append("activations recomputed")
        if self.optimizer_on_host:
            words.append("optimizer on the host")
        return ", ".join(words)


def cheapest(families: Iterable[list[MemoryPlan]], fits: Callable[[MemoryPlan], bool]) -> MemoryPlan | None:
    """The first plan that fits: families in order, and of each the largest micro-batch.

    A family lists plans that differ in the micro-batch alone, largest first. A smaller micro-batch never takes more, so
    where the last of a family does not fit, none does. An optimizer on the host never takes more either: where no plan
    with it fits in so many passes, no other plan of so many passes is tried.
    """
    fits = cache(fits)
    for _, of_so_many_passes in groupby(families, lambda family: family[0].passes):
        level = list(of_so_many_passes)
        on_host = [family for family in level if family[0].optimizer_on_host]
        if on_host and not any(fits(family[-1]) for family in on_host):
            continue
        for family in level:
            if fits(family[0]):
                return family[0]
            if len(family) > 1 and fits(family[-1]):
                return family[bisect_left(family, True, lo=1, hi=len(family) - 1, key=fits)]
    return None


def families(batch_size: int, options: MemoryOptions, *, sliceable: bool, layers: int) -> Iterator[list[MemoryPlan]]:
    """Plans in the order of their time, in lists that differ in the micro-batch alone.

    Recomputing runs the module once more, as micro-batches do; an optimizer on the host moves the parameters over and
    back; every further pass runs the module twice more, so passes come last. sliceable: False where the module ties the
    samples of a batch together; layers: of the module.
    """
    halves = [batch_size >> power for power in range(batch_size.bit_length())]
    micro_batches = [options.micro_batch] if options.micro_batch else halves
    # 1, 2, 4 and so on, up to one sample's targets a pass.
    all_passes = sorted({min(2**power, batch_size) for power in range(batch_size.bit_length() + 1)})
    where_it_helps = [False, True] if layers > 1 else [False]
    recomputes = {"auto": where_it_helps, "always": [True], "never": [False]}[options.recompute]
    hosts = {"auto": [False, True], "device": [False], "host": [True]}[options.optimizer]
    if not sliceable:
        # Recomputing is out too: running statistics would count every batch twice.
        micro_batches, all_passes, recomputes = [batch_size], [1], [False]
    for passes, host, again in product(all_passes, hosts, recomputes):
        yield [MemoryPlan(batch_size, micro, passes, again, host) for micro in micro_batches]

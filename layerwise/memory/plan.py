"""How a stage is laid out on the device, and all ways in which it may be.

A plan does not change the result beyond rounding: a smaller budget costs time, never accuracy."""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

from layerwise.config.options import MemoryOptions

ROOMS = (12 * 2**20, 4 * 2**20, 2 * 2**20, 2**20, 2**19)
"""Bytes that the loss may take on top; the first is for the whole batch alone."""

WIDE_ROOM, NARROW_ROOM, *_ = ROOMS

ROOMS_OF_GPU = (2**40, 192 * 2**20, 48 * 2**20)
"""Wider ones, for the whole batch alone; the first holds any loss. A GPU is kept busy by few and large operations, a CPU by
those whose tensors stay in its caches."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How one stage is laid out on the device. The cheapest plan is the whole batch in one slice, with everything there.

    The fields before `piece` say how the stage trains; two plans are equal where these are.
    """

    batch_size: int
    micro_batch: int
    """Samples that go through the module at once."""
    recompute: bool = False
    """Whether layers keep only their input and run again in the backward pass (activation checkpointing)."""
    optimizer_on_host: bool = False
    """Whether parameters and the optimizer's state lie in host memory, where the step is taken; module and predictors then
    come to the device when they are needed."""
    predictors: int = 0
    """Predictors that are on the device at once; 0: all. With the optimizer on the host only."""
    parts: int = 0
    """Parts of the batch that the loss is worked out for, one after another, while the representations wait on the host; 0:
    for the whole batch, and the representations stay on the device."""
    loss_room: int = WIDE_ROOM
    """Bytes that the objective may take beside representations and gradients."""
    gradients_wait: bool = False
    """Whether the gradients of the representations wait on the host, where the representations themselves do not."""
    gradients_at_once: bool = False
    """Whether each gradient of the module goes to the host as soon as a slice has made it. With the optimizer there only."""
    ahead: bool = False
    """On CUDA: whether the next batch comes to the device while a step computes, so that two of them are there."""
    resident: int = 0
    """On CUDA: rows of the input where all of it stays on the device, one of zeros among them; 0: it is read from the host."""
    piece: int = field(default=0, compare=False)
    """Input frames that are on the device at once in the caching pass; 0 until it is planned."""
    windows: int = field(default=0, compare=False)
    """Windows of the input that are on the device at once while they are recomputed; 0 where a cache or data are read."""
    overlapped: bool = field(default=False, compare=False)
    """On CUDA: whether in the caching pass the next piece comes and the outputs of the one before go while one is computed."""
    expandable: bool = field(default=False, compare=False)
    """On CUDA: whether the allocator's segments grow and shrink by pages, which takes less room for some stages."""
    why: str = field(default="", compare=False)
    """Why the stage does not train in the cheapest way; empty where it does."""

    @property
    def whole(self) -> bool:
        """Whether the batch goes through the module once, in one slice."""
        return self.micro_batch >= self.batch_size and not self.parts

    @property
    def at_once(self) -> bool:
        """Whether the loss is worked out in few and large operations; what it needs then comes to the device together."""
        return self.whole and self.loss_room > WIDE_ROOM

    def smaller(self) -> "MemoryPlan | None":
        """The next smaller slices, or None where one sample at a time and one sample's targets at a time are reached."""
        room = min(self.loss_room, NARROW_ROOM)
        if self.at_once:
            return replace(self, loss_room=room, ahead=False)
        if self.micro_batch > 1:
            return replace(self, micro_batch=self.micro_batch // 2, loss_room=room)
        if self.parts < self.batch_size:
            return replace(self, parts=min(max(2 * self.parts, 1), self.batch_size), loss_room=room)
        return None

    def takes_at_most(self, other: "MemoryPlan") -> bool:
        """Whether it never takes more memory than the other one, for each way in which they differ saves some."""
        return (
            self.recompute == other.recompute
            and self.micro_batch <= other.micro_batch
            and self.parts >= other.parts
            and (self.predictors or sys.maxsize) <= (other.predictors or sys.maxsize)
            and self.loss_room <= other.loss_room
            and self.optimizer_on_host >= other.optimizer_on_host
            and (self.gradients_wait or self.parts > 0) >= other.gradients_wait
            and self.gradients_at_once >= other.gradients_at_once
        )

    def __str__(self) -> str:
        words = [f"micro-batch {self.micro_batch}" if self.micro_batch < self.batch_size else "whole batch"]
        if self.recompute:
            words.append("activations recomputed")
        if self.optimizer_on_host:
            words.append("optimizer on the host")
        if self.parts:
            words.append("streamed" if self.parts == 1 else f"streamed in {self.parts} parts")
        if self.gradients_wait:
            words.append("gradients of representations on the host")
        if self.gradients_at_once:
            words.append("gradients to the host at once")
        if self.loss_room < (WIDE_ROOM if self.whole else NARROW_ROOM):
            words.append(f"loss in {self.loss_room / 2**20:g} MiB")
        if self.predictors:
            words.append("1 predictor at a time" if self.predictors == 1 else f"{self.predictors} predictors at a time")
        if self.resident:
            words.append("input on the device")
        if self.expandable:
            words.append("expandable segments")
        return ", ".join(words)


def families(
    batch_size: int,
    options: MemoryOptions,
    *,
    sliceable: bool,
    repeatable: bool,
    layers: int,
    stacked: int,
    wider: Sequence[int] = (),
) -> Iterator[list[MemoryPlan]]:
    """All plans that the options allow, in lists that differ in the micro-batch alone, largest first.

    sliceable: False where the module ties the samples of a batch together, so that they go through it at once; repeatable:
    False where it cannot go through it twice either; layers: of the module; stacked: predictors that can be on the device some
    at a time, 0 where the objective has no such; wider: rooms of the loss for the whole batch, beside those of ROOMS.
    """
    halves = [batch_size >> power for power in range(batch_size.bit_length())]
    micro_batches = [options.micro_batch] if options.micro_batch else halves
    where_it_helps = [False, True] if layers > 1 else [False]
    recomputes = {"auto": where_it_helps, "always": [True], "never": [False]}[options.recompute]
    hosts = {"auto": [False, True], "device": [False], "host": [True]}[options.optimizer]
    if not sliceable:
        # Recomputing is out too: running statistics would count every batch twice.
        micro_batches, recomputes = [batch_size], [False]
    # 1, 2, 4 and so on, up to one sample's targets at a time.
    all_parts = sorted({min(2**power, batch_size) for power in range(batch_size.bit_length() + 1)})
    for host, again in product(hosts, recomputes):
        some_at_a_time = [stacked >> power for power in range(1, stacked.bit_length())] if host else []
        for parts, predictors in product([0, *all_parts] if repeatable else [0], [0, *some_at_a_time]):
            rooms = ROOMS[1:] if predictors else (*wider, *ROOMS)
            either = [False, True] if host else [False]
            for room, saved in product(rooms, either):
                wait, at_once = saved and not parts, saved and parts > 0
                family = [
                    MemoryPlan(batch_size, micro, again, host, predictors, parts, room, wait, at_once)
                    for micro in micro_batches
                ]
                if not wait:
                    yield [plan for plan in family if plan.whole]
                if room < WIDE_ROOM:
                    yield [plan for plan in family if not plan.whole]  # twice through the module


def cheapest(families: Iterable[list[MemoryPlan]], fits: Callable[[MemoryPlan], bool]) -> MemoryPlan | None:
    """The first plan that fits: families in order, and of each the largest micro-batch.

    A smaller micro-batch never takes more, so where the last of a family does not fit, none does; and then none does in a
    family that takes at least as much.
    """
    fits = cache(fits)
    refused: list[MemoryPlan] = []
    for family in families:
        if any(plan.takes_at_most(family[-1]) for plan in refused):
            continue
        if fits(family[0]):
            return family[0]
        if len(family) > 1 and fits(family[-1]):
            return family[bisect_left(family, True, lo=1, hi=len(family) - 1, key=fits)]
        refused.append(family[-1])
    return None

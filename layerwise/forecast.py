"""What a run will take, before it is started."""

from collections.abc import Sequence
from dataclasses import dataclass

END_TO_END = (
    "1 stage is end-to-end training, with the loss at the top alone; without --stages each module is trained by itself"
)


def is_end_to_end(cut: Sequence[int]) -> bool:
    """Whether all layers of a network are one stage. cut: layers in each stage."""
    return len(cut) == 1 and cut[0] > 1


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage; sizes in bytes."""

    stage: int
    layers: int
    parameters: int
    train_peak_bytes: int
    """Of tensors in training; on CUDA what the allocator reserves for them, and context and margin come on top."""
    train_peak_by_kind: dict[str, int]
    cache_peak_bytes: int
    micro_batch: int
    layout: str
    why: str
    """Why the stage is not laid out in the cheapest way; empty where it is."""
    fits: bool
    cache_bytes: int
    """Of its outputs, cached or not."""
    cached: bool
    host_bytes: int
    flops: int
    """Floating point operations of an optimizer step."""
    moved_bytes: int
    """That a step moves between host and device, both ways."""
    input: str
    """Where its samples come from: data, cache, recompute where the stage below is not cached, or device where the cache stays
    there."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take; sizes in bytes."""

    budget_bytes: int | None
    fits: bool
    smallest_budget_bytes: int
    peak_bytes: int
    """Largest of all stages, on CUDA with context and margin."""
    cache_bytes: int
    """Of all caches that are written."""
    disk_bytes: int
    """Most that the caches take at once, under --keep."""
    disk_budget_bytes: int | None
    notes: list[str]
    """What is not cached, why, and what it costs; whether this is end-to-end training; what is to be said of the data."""
    host_bytes: int
    hours: float
    """Of all epochs of each stage that the options allow, at the full speed of the device; a run takes longer."""
    device: str
    stages: list[StageForecast]

    @property
    def flops(self) -> int:
        """Floating point operations of an optimizer step of every stage."""
        return sum(stage.flops for stage in self.stages)

    @property
    def moved_bytes(self) -> int:
        """What an optimizer step of every stage moves between host and device, both ways."""
        return sum(stage.moved_bytes for stage in self.stages)

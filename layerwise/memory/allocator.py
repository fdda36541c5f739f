"""The meter on CUDA: the allocator counts every byte anyway, so looking at each operation would cost time for nothing.

It counts what tensors asked for, as the other meter does; what the allocator rounds up and keeps in reserve comes on top,
and `cap` bounds both.
"""

from collections.abc import Iterable
from types import TracebackType

import torch

from layerwise.memory.meter import KINDS, Kind, Meter


class AllocatorMeter:
    """The same questions as `Meter` answers, about tensors that are made after it is entered."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self._labelled: dict[Kind, int] = {}

    def __enter__(self) -> "AllocatorMeter":
        self._before = self._requested("current")
        self.reset_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The allocator counts on."""

    @property
    def live(self) -> int:
        return self._requested("current") - self._before

    @property
    def peak(self) -> int:
        return self._requested("peak") - self._before

    @property
    def peak_by_kind(self) -> dict[Kind, int]:
        """Parameters and optimizer as they were labelled, gradients at their most; the rest are activations."""
        labelled = {kind: self._labelled.get(kind, 0) for kind in KINDS}
        return labelled | {"activations": max(self.peak - sum(labelled.values()), 0)}

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def label(self, kind: Kind, tensors: Iterable[torch.Tensor | None]) -> None:
        """Gradients come one by one and go together, so they are taken as large as the parameters they belong to."""
        if kind != "gradients":
            held = sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
            self._labelled[kind] = max(held, self._labelled.get(kind, 0))
            if kind == "parameters":
                self._labelled["gradients"] = self._labelled[kind]

    def looks(self, name: str, *sizes: int) -> bool:
        """Never: there is nothing to look at."""
        return False

    def _requested(self, when: str) -> int:
        # Nested, as the allocator gives it: memory_stats would flatten and sort hundreds of numbers at every step.
        return torch.cuda.memory_stats_as_nested_dict(self._device)["requested_bytes"]["all"][when]


AnyMeter = Meter | AllocatorMeter


def meter_for(device: torch.device, limit: int | None) -> AnyMeter:
    """The meter of a device. limit: bytes at which it refuses; on CUDA the allocator's cap does that."""
    return AllocatorMeter(device) if device.type == "cuda" else Meter(device, limit)

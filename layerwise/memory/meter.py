"""Counts the bytes of live tensors on one device, and refuses to pass the budget.

A dispatch mode sees the output of every operation, forward and backward; a storage is counted once, from its first
sight until it is freed. That works on any device, so each promise about memory is tested without a GPU.
Only tensors that are made inside the `with` block, by this thread, count; numpy arrays and loader threads are the host's.
"""

import weakref
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from layerwise.errors import BudgetError


def host_tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor that shares its memory and does not count: it lies on the host, on a CPU too."""
    with _disable_current_modes():
        return torch.from_numpy(array)


class Meter(TorchDispatchMode):
    """`live` and `peak` are bytes on the device; BudgetError where `live` would pass `limit`."""

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        super().__init__()
        self.device_type = device.type
        self.limit = limit
        self.live = 0
        self.peak = 0
        self._storages: dict[int, tuple[weakref.ref, int]] = {}

    def reset_peak(self) -> None:
        """Starts a new peak from what is live now."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._count(result)
        else:
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    self._count(value)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        size = storage.nbytes()
        if known is not None and known[1] == size:
            return
        if known is not None:
            self.live -= known[1]
        self._storages[key] = (weakref.ref(storage, lambda _: self._release(key)), size)
        self.live += size
        self.peak = max(self.peak, self.live)
        if self.limit is not None and self.live > self.limit:
            raise BudgetError(
                f"The device holds {self.live:,} bytes, more than the budget of {self.limit:,} bytes; "
                "give a larger --gpu-mem, or a smaller --batch-size."
            )

    def _release(self, key: int) -> None:
        _, size = self._storages.pop(key)
        self.live -= size

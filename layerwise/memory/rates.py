"""How fast a device computes, and how fast bytes reach it: what the time of a memory plan is predicted from."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from layerwise.memory.device import return_free_blocks
from layerwise.memory.meter import uncounted

MATRIX = {"cpu": 512, "cuda": 2048}
"""Rows and columns that are multiplied: enough to keep the device busy, and few bytes, for a budget may be small."""

COPIED_BYTES = 2**25

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a device, per second."""

    flops: float
    """Of float32 matrix products; multiplications and additions counted each."""
    bytes: float
    """Moved between pageable host memory and the device."""

    @property
    def flops_per_byte(self) -> int:
        """Operations done while a byte is moved, to the nearest power of 4: what is measured twice is to come out the same."""
        ratio, power = self.flops / self.bytes, 1
        while ratio > 2 * power:
            power *= 4
        return power


RATES: dict[torch.device, Rates] = {}
"""Those that this process knows of."""


def measured_rates(device: torch.device) -> Rates:
    """Measured once in a process; takes about a tenth of a second, and leaves nothing on the device."""
    if device not in RATES:
        RATES[device] = _measured(device)
        return_free_blocks(device)  # CUDA's allocator would keep them, beyond a small budget
    return RATES[device]


def _measured(device: torch.device) -> Rates:
    with uncounted():
        side = MATRIX[device.type]
        matrix, outcome = torch.ones(side, side, device=device), torch.empty(side, side, device=device)
        on_host = torch.ones(COPIED_BYTES // 4)
        product = _seconds(lambda: torch.mm(matrix, matrix, out=outcome), device)
        copy = _seconds(lambda: on_host.to(device, copy=True), device)
    return Rates(2 * side**3 / product, COPIED_BYTES / copy)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of some rounds: whatever disturbs one makes it longer."""
    times = []
    for _ in range(ROUNDS):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

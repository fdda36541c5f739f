"""The most device memory that the driver has shown while something ran."""

import threading

import torch

from layerwise.memory.driver import process_bytes

EVERY = 0.002
"""Seconds between two looks."""


class DriverWatch:
    """Looks again and again, in a thread of its own. Memory that others held when it began is not counted."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._most, self._over = device, 0, threading.Event()
        self._others = max(self._taken() - process_bytes(device), 0)
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> "DriverWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def take(self) -> int:
        """Bytes at the highest point since it was asked last."""
        most = max(self._most, self._look())
        self._most = 0
        return most

    def _look_on(self) -> None:
        while not self._over.wait(EVERY):
            self._most = max(self._most, self._look())

    def _look(self) -> int:
        return self._taken() - self._others

    def _taken(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

"""Memory for batches that is used again: of the system, fresh pages take several times as long as what is read into them."""

import ctypes
import math
import weakref
from collections import deque

import numpy as np

_KEPT = 4
"""Batches whose memory is kept while nobody holds them: the two that training reads ahead, and those around the step."""


class BatchMemory:
    """Arrays for any number of threads. The memory of one comes back when nothing looks into it any more."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_KEPT)

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Contiguous, with whatever lay there before."""
        room = self._take(math.prod(shape) * np.dtype(dtype).itemsize)
        # Arrays and tensors that share memory keep alive what lent it: not the array that they were made of, but this.
        lent = (ctypes.c_ubyte * len(room)).from_buffer(room)
        weakref.finalize(lent, self._free.append, room).atexit = False
        return np.ndarray(shape, dtype, lent)

    def _take(self, size: int) -> np.ndarray:
        """Memory that is large enough; what is too small is let go of, since later batches would not fit either."""
        while True:
            try:
                room = self._free.pop()
            except IndexError:
                return np.empty(max(size, 1), dtype=np.uint8)
            if len(room) >= size:
                return room

"""A batch and what is drawn for it, side by side in host memory: one copy brings all of it to a GPU, and nobody waits."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from layerwise.memory.meter import in_host_memory

ALIGNED = 16
"""Bytes: everything begins at a multiple of them, as its dtype asks."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Bytes of a buffer that are a tensor."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def behind(cls, end: int, tensor: torch.Tensor) -> "_Place":
        begin = -(-end // ALIGNED) * ALIGNED
        return cls(begin, begin + tensor.nbytes, tensor.dtype, tensor.shape)

    def within(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.begin : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Small arrays by their names, and frames behind them."""

    buffer: torch.Tensor
    """uint8 [bytes] of the host; pinned for a GPU, which then fetches it by itself."""
    _arrays: dict[str, _Place]
    _frames: _Place | None

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], frames: torch.Tensor | None, device: torch.device) -> "Packed":
        """Copies them. frames: of the host; device: where all of it is to go."""
        with in_host_memory():
            tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
            places: dict[str, _Place] = {}
            end = 0
            for name, tensor in tensors.items():
                places[name] = _Place.behind(end, tensor)
                end = places[name].end
            behind = None if frames is None else _Place.behind(end, frames)
            size = end if behind is None else behind.end
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
            if not isinstance(buffer, FakeTensor):  # a rehearsal has no values
                for name, tensor in tensors.items():
                    _copy(tensor, buffer, places[name])
                if behind is not None and frames is not None:
                    _copy(frames, buffer, behind)
        return cls(buffer, places, behind)

    @property
    def frames(self) -> torch.Tensor | None:
        """On the host."""
        if self._frames is None:
            return None
        with in_host_memory():
            return self._frames.within(self.buffer)

    def on_device(self, device: torch.device) -> torch.Tensor:
        """A copy of the buffer; on a CPU too, so that it counts there."""
        return self.buffer.to(device, copy=True, non_blocking=self.buffer.is_pinned())

    def unpacked(self, whole: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Arrays and frames in a copy of the buffer. Each of the two can be let go of by itself."""
        frames, of_arrays = None, whole
        if self._frames is not None:
            frames, of_arrays = self._frames.within(whole), whole[: self._frames.begin].clone()
        return {name: place.within(of_arrays) for name, place in self._arrays.items()}, frames


def _copy(tensor: torch.Tensor, buffer: torch.Tensor, place: _Place) -> None:
    """As bytes by numpy: a torch copy would start a second team of threads, which fights with the device's work."""
    buffer.numpy()[place.begin : place.end] = tensor.contiguous().flatten().view(torch.uint8).numpy()

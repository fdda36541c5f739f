"""Copies between host and device on a stream of their own, while the device computes.

Device memory is asked for on the stream that computes, never on this one: CUDA's allocator keeps the blocks of each stream
apart, and plans know of one. So the copy waits until what lay in that memory before has been used; and whoever lets go of
memory that is copied waits for the copy first, for it may be handed out again at once.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Arriving:
    """Bytes on their way to the device."""

    _there: torch.Tensor
    _copied: torch.cuda.Event

    def arrived(self) -> torch.Tensor:
        """The copy; what is computed from now on waits for it. To be called before it is let go of, too."""
        torch.cuda.current_stream(self._there.device).wait_event(self._copied)
        return self._there


@dataclass(slots=True)
class Leaving:
    """Tensors on their way to the host."""

    _here: tuple[torch.Tensor, ...]
    _on_host: tuple[torch.Tensor, ...]
    _copied: torch.cuda.Event

    def left(self) -> tuple[torch.Tensor, ...]:
        """The copies, in pinned memory, when they are there: the host waits. The device has its memory back then."""
        self._copied.synchronize()
        self._here = ()
        return self._on_host


class CopyStream:
    """A stream of a CUDA device, for copies of one direction."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def bring(self, pinned: torch.Tensor) -> Arriving:
        """A copy of a contiguous tensor of pinned memory."""
        there = torch.empty(pinned.shape, dtype=pinned.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            there.copy_(pinned, non_blocking=True)
        return Arriving(there, self._stream.record_event())

    def take(self, *tensors: torch.Tensor) -> Leaving:
        """Copies of contiguous tensors of the device, as they are when all that is queued by now has been done."""
        on_host = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor, copy in zip(tensors, on_host, strict=True):
                copy.copy_(tensor, non_blocking=True)
        return Leaving(tensors, on_host, self._stream.record_event())

"""Host memory beside a device, and the one way between the two, which counts the bytes; FLOPs are counted beside them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from layerwise.config import Config
from layerwise.memory.flops import FlopCounter
from layerwise.memory.meter import uncounted
from layerwise.memory.recurrence import FoldedFrames
from layerwise.nets.network import copied
from layerwise.training.optimizer import adam

REHEARSED_SLICES = 2
"""The first makes the gradients; the second adds to them, like all that follow."""


class Host:
    """Where the tensors lie that are not on the device, and how they get there and back.

    rehearsed: in a rehearsal (`layerwise.memory.meter.rehearsal`) host tensors have shapes alone.
    """

    def __init__(self, device: torch.device, rehearsed: bool = False) -> None:
        self.device, self.rehearsed = device, rehearsed
        self.moved = 0
        """Bytes, down and up."""
        self.flops = FlopCounter()

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Of a layer whose activations are worked out again: torch forgets the rehearsal's modes in the backward pass."""
        return nullcontext(), FoldedFrames(lambda: 0) if self.rehearsed else nullcontext()

    def empty(self, *shape: int) -> torch.Tensor:
        """A float32 tensor on the host, pinned where that speeds transfers up."""
        with uncounted():
            if self.rehearsed:
                return torch.empty(shape, device="meta")
            tensor = torch.empty(shape)
            return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def build(self, make: Callable[[], Any]) -> Any:
        """What `make` makes of tensors, on the host."""
        with uncounted(), torch.device("meta" if self.rehearsed else "cpu"):
            return make()

    def up(self, tensor: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """A copy of these rows on the device."""
        with uncounted():
            part = tensor.detach()[rows]
        self.moved += part.nbytes
        if self.rehearsed:
            return torch.empty(part.shape, dtype=part.dtype, device=self.device)
        return part.to(self.device, copy=True, non_blocking=part.is_pinned())

    def down(self, tensor: torch.Tensor, into: torch.Tensor, rows: slice = slice(None)) -> None:
        """Copies a tensor of the device into these rows."""
        self.moved += tensor.nbytes
        if not self.rehearsed:
            with uncounted(), torch.no_grad():
                (into[rows] if into.dim() else into).copy_(tensor)

    def up_module(self, module: nn.Module) -> nn.Module:
        """A copy of a module on the device."""
        self.moved += sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
        return copied(module, self.device)

    def down_buffers(self, module: nn.Module, into: nn.Module) -> None:
        """What a module has counted by itself, such as the statistics of batch norm."""
        for buffer, original in zip(module.buffers(), into.buffers(), strict=True):
            self.down(buffer, original)

    def up_rows(self, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """These rows, int64 [n] on the host, wherever they lie."""
        if self.rehearsed:
            return self.up(tensor, slice(len(rows)))
        with uncounted():
            chosen = tensor.index_select(0, rows)
        return self.up(chosen)

    def add(self, tensor: torch.Tensor, into: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds a tensor of the device to these rows, int64 [n] on the host."""
        self.moved += tensor.nbytes
        if not self.rehearsed:
            with uncounted():
                into.index_add_(0, rows, tensor.cpu())

    def refresh(self, tensor: torch.Tensor, original: torch.Tensor) -> None:
        """Gives a tensor of the device its values on the host, in the room that it has."""
        self.moved += original.nbytes
        if not self.rehearsed:
            with uncounted():
                tensor.data.copy_(original.detach())

    def adam(self, parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.Optimizer:
        """For parameters on the host."""
        if self.rehearsed:  # it will not step
            return torch.optim.Adam(parameters)
        with uncounted():
            return adam(config.training.lr, config.training.adam_eps).make(parameters)

    def step(self, optimizer: torch.optim.Optimizer, gradients: Iterable[torch.Tensor]) -> None:
        """A step of an optimizer whose parameters lie on the host, with gradients that lie on the device."""
        for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
            with uncounted():
                parameter.grad = torch.empty_like(parameter)
            self.down(gradient, parameter.grad)
        if not self.rehearsed:
            with uncounted():
                optimizer.step()
        optimizer.zero_grad()

    def slices(self, samples: int, at_once: int) -> Iterator[slice]:
        """So many samples at once. A rehearsal goes through the first two slices, and counts all others like the second."""
        starts = range(0, samples, at_once)
        if not self.rehearsed or len(starts) <= REHEARSED_SLICES:
            for start in starts:
                yield slice(start, min(start + at_once, samples))
            return
        if samples % at_once:
            raise ValueError(
                f"A rehearsal needs slices of one size; {at_once} samples at once do not divide {samples}."
            )
        yield slice(0, at_once)
        moved, flops = self.moved, self.flops.total
        yield slice(at_once, 2 * at_once)
        self.moved += (len(starts) - 2) * (self.moved - moved)
        self.flops.total += (len(starts) - 2) * (self.flops.total - flops)

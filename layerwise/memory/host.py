"""Host memory beside the device: what waits there, and what is moved between the two.

No meter counts it, on a CPU either, where the two are the same memory.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from layerwise.memory.meter import uncounted

ALL = slice(None)

Group = tuple[slice, torch.Tensor, torch.Tensor | None]
"""Some rows of a parameter, their values on the device, and a gradient that is to be added to, where one is wanted."""


@dataclass(slots=True)
class HostMemory:
    """Copies tensors to the host and back, and counts what it moves."""

    moved: int = 0
    """Bytes, in both directions."""

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor of the device, in host memory."""
        with uncounted():
            copy = tensor.detach().to("cpu", copy=True)
        self.moved += copy.nbytes
        return copy

    def bring(self, tensor: torch.Tensor, device: torch.device, part: slice | torch.Tensor = ALL) -> torch.Tensor:
        """A copy of some rows of a tensor of the host, on the device; a copy on a CPU too, so that it counts there."""
        with uncounted():
            chosen = tensor.detach() if part is ALL else tensor.detach()[part]
        self.moved += chosen.nbytes
        # Without waiting, where the tensor is pinned; what is done with it next waits by itself.
        return chosen.to(device, copy=True, non_blocking=chosen.is_pinned())

    def add_gradient(self, parameter: torch.Tensor, part: slice, gradient: torch.Tensor) -> None:
        """Adds a gradient of the device to that of some rows of a parameter of the host."""
        with uncounted():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad[part] += gradient.to("cpu")
        self.moved += gradient.nbytes

    def visits(self, parameter: torch.Tensor, at_once: int, device: torch.device, graded: bool) -> Iterator[Group]:
        """Brings so many rows of a parameter of the host at a time; graded: with a gradient, which it takes back.

        Whoever is given them lets go of them before the next.
        """
        for start in range(0, len(parameter), at_once):
            rows = slice(start, min(start + at_once, len(parameter)))
            values = self.bring(parameter, device, rows)
            gradient = torch.zeros_like(values) if graded else None
            yield rows, values, gradient
            if gradient is not None:
                self.add_gradient(parameter, rows, gradient)
            del values, gradient

    @contextmanager
    def lend(
        self,
        tensors: Iterable[torch.Tensor],
        device: torch.device,
        gradients_at_once: bool = False,
        changes_parameters: bool = False,
    ) -> Iterator[None]:
        """Parameters and buffers of the host are on the device inside the block, and on the host again behind it.

        Gradients come back with their parameters, or each at once when a backward pass has made it. What the block does to
        buffers and to values of parameters stays done. changes_parameters: whether it may do so to parameters in
        ways that torch does not count, through `.data`.
        """
        with uncounted():
            lent = [(tensor, tensor.data) for tensor in tensors]
        parameters = [tensor for tensor, _ in lent if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
        gradients: dict[torch.Tensor, torch.Tensor] = {}

        def take_gradient(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            gradient = self.keep(parameter.grad)
            parameter.grad = None
            with uncounted():
                gradients[parameter] = gradients[parameter].add_(gradient) if parameter in gradients else gradient

        hooks = [p.register_post_accumulate_grad_hook(take_gradient) for p in parameters if gradients_at_once]
        try:
            for tensor, values in lent:
                tensor.data = self.bring(values, device)
            versions = [tensor._version for tensor, _ in lent]
            yield
            for (tensor, values), version in zip(lent, versions, strict=True):
                if tensor.grad is not None:
                    take_gradient(tensor)
                if changes_parameters or not isinstance(tensor, nn.Parameter) or tensor._version != version:
                    with uncounted():
                        values.copy_(tensor.detach())
                    self.moved += values.nbytes
        finally:
            for hook in hooks:
                hook.remove()
            for tensor, values in lent:
                tensor.grad, tensor.data = None, values
        for tensor, gradient in gradients.items():
            tensor.grad = gradient

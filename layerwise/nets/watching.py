"""What a module does that matters when a batch is sliced, seen in the operations of a forward pass without values.

That takes as long for a huge module as for a small one. Which samples an output depends on is not seen.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from layerwise.nets.behaviour import Behaviour, changes_itself


def watched(module: nn.Module, forward: Callable[[torch.Tensor], Any], x: torch.Tensor) -> tuple[Behaviour, int]:
    """What a module of fake tensors does in the forward pass of x, and the floating point operations that it takes.

    To be called in the FakeTensorMode in which both were made.
    """
    before = _tensors(module)
    with FlopCounterMode(display=False) as counter, _Watch() as watch:
        forward(x)
    after = _tensors(module)
    changed = (
        name
        for name, tensor in before.items()
        if tensor.untyped_storage()._cdata in watch.written or after.get(name) is not tensor
    )
    first = next(changed, None)
    return Behaviour(watch.draws, first and changes_itself(module, first)), counter.get_total_flops()


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by their paths."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Watch(TorchDispatchMode):
    """Notes whether an operation draws, and the storages that operations write into."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = False
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        given = {argument.name: argument.default_value for argument in arguments}
        given |= {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        # Fused attention is called random whatever its rate.
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags and given.get("dropout_p") != 0
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensors = (value for value in tree_iter(given.get(argument.name)) if isinstance(value, torch.Tensor))
                self.written.update(tensor.untyped_storage()._cdata for tensor in tensors)
        return func(*args, **kwargs)

"""What a module does in training that matters when a batch is sliced, or goes through it twice.

What a module does that matters when a batch is sliced, as far as the names of its parts and functions tell.

Some is known by name alone: a part can be named before anything has run. For what is not, see `trying` and `watching`.

What a module does that matters when a batch is sliced, seen in the operations of a forward pass without values.

That takes as long for a huge module as for a small one. Which samples an output depends on is not seen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class BatchEffects:
    """As one way of looking has found it: `by_name`, `watched` or `tried`."""

    draws: bool
    """Whether the forward pass draws random numbers."""
    why_unsliceable: str | None
    """Why a batch goes through it once and whole, as in "layers.1.unit.1 (BatchNorm2d) ties the samples of a batch
    together". None where the outputs of slices are those of the batch, and the same at every pass."""


def ties_samples(part: str) -> str:
    """The reason to keep a batch whole. part: as `path_and_class` names it."""
    return f"{part} ties the samples of a batch together"


def changes_itself(module: nn.Module, tensor: str) -> str:
    """The reason to run a batch once. tensor: path of the buffer or parameter that a forward pass changes."""
    path, _, field = tensor.rpartition(".")
    return f"{path_and_class(path, module.get_submodule(path))} changes its '{field}' at every forward pass"


def path_and_class(path: str, part: nn.Module) -> str:
    """As in "layer1.0.bn1 (BatchNorm2d)"."""
    return f"{path} ({type(part).__name__})".lstrip()


RANDOM = ("dropout", "rand", "bernoulli", "normal_", "rrelu", "fractional_max_pool", "dot_product_attention")
"""Parts of the names of functions that may draw."""


def by_name(module: nn.Module) -> BatchEffects:
    """What the names say of a module."""
    mixing, changing = mixes_samples(module), _changes_itself(module)
    why = ties_samples(mixing) if mixing else changing and f"{changing} changes itself at every forward pass"
    return BatchEffects(draws_at_random(module), why)


def mixes_samples(module: nn.Module) -> str | None:
    """Path and class of the first submodule that mixes samples in training, as in "layer1.0.bn1 (BatchNorm2d)".

    Batch normalisation takes its statistics from the whole batch, so they depend on how the batch is sliced; running
    statistics depend on the order of the slices. None where there is no such submodule.
    """
    for name, part in module.named_modules():
        for called in _calls(part):
            if "batch_norm" in called or "instance_norm" in called:
                return f"{name} ({called})".lstrip()
        if isinstance(part, _BatchNorm) or (isinstance(part, _InstanceNorm) and part.track_running_stats):
            return path_and_class(name, part)
    return None


def draws_at_random(module: nn.Module) -> bool:
    """Whether its forward pass may draw random numbers in training: some part has a dropout rate, or calls for them."""
    for part in module.modules():
        rates = (getattr(part, name, None) for name in ("p", "dropout"))
        if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return True
        if isinstance(part, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
            return True
        if any(word in called for called in _calls(part) for word in RANDOM):
            return True
    return False


def _changes_itself(module: nn.Module) -> str | None:
    """Path and class of the first part with a spectral norm, of either kind."""
    for name, part in module.named_modules():
        if any("SpectralNorm" in type(by).__name__ for by in (part, *part._forward_pre_hooks.values())):
            return path_and_class(name, part)
    return None


def _calls(part: nn.Module) -> list[str]:
    """Names of the functions that a traced module calls."""
    if not isinstance(part, fx.GraphModule):
        return []
    calls = (node.target for node in part.graph.nodes if node.op in ("call_function", "call_method"))
    return [call if isinstance(call, str) else getattr(call, "__name__", str(call)) for call in calls]


def observe_operations(
    module: nn.Module, forward: Callable[[torch.Tensor], Any], x: torch.Tensor
) -> tuple[BatchEffects, int]:
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
    return BatchEffects(watch.draws, first and changes_itself(module, first)), counter.get_total_flops()


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

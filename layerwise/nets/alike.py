"""Which layers are alike: they compute the same from weights of the same shapes, so what one takes is measured once.

A layer that holds objects of which nothing is known here is like no other.
"""

from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from layerwise.nets.network import Network, memoised_per, named_tensors, without_values

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Alike:
    """Shared by all stages that are alike; what is memoised for one of them is memoised for all."""


@memoised_per(Network)
def alike(network: Network, *traits: object) -> Alike:
    """The same object for the same traits, which are hashable."""
    return Alike()


@memoised_per(Network)
def layer_traits(network: Network, index: int) -> str:
    """Equal for layers that are alike."""
    layer = without_values(network, range(index, index + 1)).layers[str(index)]
    numbers: dict[int, int] = {}
    shared = [numbers.setdefault(id(tensor), number) for number, (_, tensor) in enumerate(named_tensors(layer))]
    return repr([shared, _traits(layer)])


def _traits(module: nn.Module) -> str:
    # Two classes may have one name. Traced and parametrized modules have a class each, which says nothing.
    kind = fx.GraphModule if isinstance(module, fx.GraphModule) else type_before_parametrizations(module)
    return repr([id(kind), module.training, _settings(module), _inside(module)])


def _settings(module: nn.Module) -> list[object]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    hooks = [key for name, value in vars(module).items() if name in _HOOKS for key in value or ()]
    if isinstance(module, fx.GraphModule):
        return [[_described(tensor) for _, tensor in tensors], hooks]
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return [
        [(name, _described(tensor)) for name, tensor in tensors],
        hooks,
        [(name, _described(own[name])) for name in sorted(own)],
    ]


def _inside(module: nn.Module) -> list[object]:
    """Its parts; of a traced module its operations, which call parts whatever their names."""
    if not isinstance(module, fx.GraphModule):
        return [(name, _traits(part)) for name, part in module.named_children()]
    numbers = {node: f"%{number}" for number, node in enumerate(module.graph.nodes)}
    return [
        (node.op, _target(module, node), repr(fx.map_arg((node.args, node.kwargs), numbers.__getitem__)))
        for node in module.graph.nodes
    ]


def _target(module: fx.GraphModule, node: fx.Node) -> object:
    if node.op == "call_module":
        return _traits(module.get_submodule(str(node.target)))
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        return _described(getattr(module.get_submodule(path), name))
    return None if node.op in ("placeholder", "output") else _described(node.target)


def _described(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.requires_grad
    if isinstance(value, bool | int | float | complex | str | bytes | Enum | torch.dtype | torch.device | None):
        return repr(value)
    if isinstance(value, tuple | list):
        return [_described(entry) for entry in value]
    return id(value)

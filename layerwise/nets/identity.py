"""A hash of everything that a traced network computes with: operations, settings of its parts, and tensors."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Set
from enum import Enum
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import fx, nn


def identity(units: Iterable[fx.GraphModule]) -> str:
    """SHA-256 of operations, settings and the values of all tensors; the same in every process."""
    return _digest(units, frozenset())


def structure(units: Iterable[fx.GraphModule]) -> str:
    """The same without the values of weights, which a trained encoder brings along."""
    units = list(units)
    return _digest(units, {name for unit in units for name in unit.state_dict()})


def _digest(units: Iterable[fx.GraphModule], without_values: Set[str]) -> str:
    total = hashlib.sha256()
    for unit in units:
        total.update(unit.code.encode())
        for name, part in unit.named_modules():
            total.update(f"{name} {_named(type(part))} {_settings(part)}".encode())
        for name, tensor in _tensors(unit):
            total.update(name.encode())
            plain = name.partition(" is ")[0]
            total.update(_about(tensor) if plain in without_values else _about(tensor) + _values(tensor))
    return total.hexdigest()


def _settings(part: nn.Module) -> str:
    """The public attributes that are plain values; the mode is none, since units have their own."""
    return str({name: _written(value) for name, value in sorted(vars(part).items()) if _is_setting(name)})


def _is_setting(name: str) -> bool:
    return not name.startswith("_") and name != "training"


def _written(value: Any) -> str:
    """A value in words that do not depend on where it lies in memory; of a foreign object its class."""
    if isinstance(value, bool | int | float | complex | str | bytes | Enum | torch.dtype | None):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(_about(value) + _values(value)).hexdigest()
    if isinstance(value, tuple | list):
        return str([_written(entry) for entry in value])
    if isinstance(value, Mapping):
        return str([(_written(key), _written(entry)) for key, entry in value.items()])
    if isinstance(value, partial):
        return str([_written(value.func), _written(value.args), _written(value.keywords)])
    return _named(value) if hasattr(value, "__qualname__") else _named(type(value))


def _named(thing: Any) -> str:
    """Of a function or a class."""
    return f"{getattr(thing, '__module__', '')}.{thing.__qualname__}"


def _tensors(unit: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, saved or not, and plain tensor attributes; those of two names say so."""
    constants = (
        (f"{path}.{name}", value)
        for path, part in unit.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    )
    first: dict[int, str] = {}
    for name, tensor in chain(
        unit.named_parameters(remove_duplicate=False), unit.named_buffers(remove_duplicate=False), constants
    ):
        yield f"{name} is {first.setdefault(id(tensor), name)}", tensor


def _about(tensor: torch.Tensor) -> bytes:
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode()


def _values(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

"""A traced network as layers: each unit of it, applied to every frame.

Its identity is a hash of everything that it computes with: operations, settings of its parts, and tensors.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from enum import Enum
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import fx, nn

from layerwise.errors import ConfigError, did_you_mean
from layerwise.nets.comparison import check_units, reads_ids
from layerwise.nets.kernels import same_attention, same_recurrence
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network, copied, named_tensors
from layerwise.nets.tracing import trace_named, why_uncut

T = TypeVar("T")


def traced_network(model: nn.Module, frame_shape: tuple[int, ...], at: Sequence[str] = ()) -> Network:
    """The model as a network with one stage per unit, for frames of this shape (channels first).

    at: paths of the modules that begin a stage, in place of a stage per unit. Its layers start from the model's present
    weights, whatever the seed. Raises ConfigError as `trace` and `check_units` do, and where there is no cut before a module.
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    example = torch.zeros(1, *frame_shape, device=device)
    units, begins = trace_named(model, example)
    check_units(model, units, example)
    layers = [partial(FrameUnit, unit, first=index == 0) for index, unit in enumerate(units)]
    return Network(
        layers,
        natural_cut=_cut_at(model, begins, at) if at else (1,) * len(layers),
        identity=identity(units),
        structure=structure(units),
        reads_ids=reads_ids(units[0]),
        why_no_finer=partial(why_uncut, model, example),
        model=model,
    )


def with_present_weights(network: Network) -> Network:
    """The network with the identity that its module has now: it may have been trained since it was cut."""
    if network.model is None:
        return network
    present = identity(cast(FrameUnit, build()).unit for build in network.layers)
    return network if present == network.identity else replace(network, identity=present)


def by_own_names(model: nn.Module, weights: Mapping[str, T]) -> dict[str, T]:
    """An encoder's weights by the names that the model itself has for them, in the model's order.

    A weight of several names stands under each of them. What the cut does not reach, such as a head that the forward does not
    call, is left out.
    """
    found = {name.split(".", 3)[3]: value for name, value in weights.items()}  # without layers.INDEX.unit
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    for shared in names.values():
        for name in shared:
            if name in found:
                found |= dict.fromkeys(shared, found[name])
                break
    return {name: found[name] for name in model.state_dict() if name in found}


@torch.no_grad()
def give_weights(model: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Copies an encoder's weights into the model's own tensors, wherever these lie."""
    tensors = model.state_dict()
    for name, value in by_own_names(model, weights).items():
        tensors[name].copy_(torch.from_numpy(value))


def _cut_at(model: nn.Module, modules_of: Sequence[Sequence[str]], at: Sequence[str]) -> tuple[int, ...]:
    """Units in each stage, where stages begin with these modules. modules_of: by unit, the modules that begin with it."""
    begins = {path: index for index, paths in enumerate(modules_of) for path in paths}
    modules = dict(model.named_modules())
    for path in at:
        if path not in modules:
            raise ConfigError(f"The network has no module '{path}' to begin a stage with.{did_you_mean(path, modules)}")
        if path not in begins:
            possible = ", ".join(list(begins)[:20]) + (", ..." if len(begins) > 20 else "")
            raise ConfigError(
                f"The network cannot be cut before '{path}': more than one tensor is needed behind that place, or a weight is "
                f"used on both sides; stages can begin with {possible}."
            )
    starts = sorted({0, *(begins[path] for path in at)})
    return tuple(stop - start for start, stop in pairwise([*starts, len(modules_of)]))


class FrameUnit(Layer):
    """A copy of a unit on torch's default device, applied to every frame.

    Frames have their channels first. A unit's output (N, tokens, D) has them last, as in a transformer: it is handed
    on as (N, D, tokens), and the next unit turns it back; `first` marks the unit that reads the network's input as is.
    """

    def __init__(self, unit: fx.GraphModule, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.unit = copied(unit)
        self._has_lstm = any(isinstance(part, nn.LSTM) for part in unit.modules())
        self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, *frame) to (B, L, *output frame)."""
        frames = x.flatten(0, 1)
        if frames.dim() == 3 and not self.first:
            # The unit may rely on the layout that the network itself would have given it, as .view() does.
            frames = frames.transpose(1, 2).contiguous()
        with same_attention(), same_recurrence() if self._has_lstm else contextlib.nullcontext():
            y = self.unit(frames)
        return (y.transpose(1, 2) if y.dim() == 3 else y).unflatten(0, x.shape[:2])


def identity(units: Iterable[fx.GraphModule]) -> str:
    """SHA-256 of operations, settings and the values of all tensors; the same in every process."""
    return _digest(units, frozenset())


def structure(units: Iterable[fx.GraphModule]) -> str:
    """The same without the values of weights, which a trained encoder brings along."""
    units = list(units)
    return _digest(units, {name for unit in units for name in unit.state_dict()})


OF_A_UNIT = str({"meta": "[]", "shape_env": "None"})
"""The settings of a unit itself, as torch 2.12 has them. Other versions keep other things there; none changes what it does."""


def _digest(units: Iterable[fx.GraphModule], without_values: Set[str]) -> str:
    total = hashlib.sha256()
    for unit in units:
        total.update(unit.code.encode())
        for name, part in unit.named_modules():
            settings = OF_A_UNIT if part is unit else _settings(part)
            total.update(f"{name} {_named(type(part))} {settings}".encode())
        first: dict[int, str] = {}  # a tensor of two names says so
        for name, tensor in named_tensors(unit):
            total.update(f"{name} is {first.setdefault(id(tensor), name)}".encode())
            total.update(_about(tensor) if name in without_values else _about(tensor) + _values(tensor))
    return total.hexdigest()


def _settings(part: nn.Module) -> str:
    """The public attributes that are plain values; the mode is none, since units have their own."""
    public = (item for item in sorted(vars(part).items()) if not item[0].startswith("_") and item[0] != "training")
    return str({name: _written(value) for name, value in public})


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


def _about(tensor: torch.Tensor) -> bytes:
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode()


def _values(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

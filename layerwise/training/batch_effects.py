"""Whether the batches of a stage may be sliced, found out layer by layer and remembered.

Each layer is watched without values; where that shows a run to be cheap, two samples run through it. Names alone are left
for what cannot be run. All of it lies in host memory, and no meter counts it.

Whether the batches of a run may be shared by several ranks."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerwise.errors import ConfigError
from layerwise.memory.meter import uncounted
from layerwise.memory.ranks import Ranks
from layerwise.nets.batch_effects import (
    BatchEffects,
    by_name,
    mixes_samples,
    observe_operations,
    path_and_class,
    ties_samples,
)
from layerwise.nets.copying import with_first_weights
from layerwise.nets.layer import Layer
from layerwise.nets.module import Module
from layerwise.nets.network import Network
from layerwise.nets.trial_run import tried
from layerwise.training.spec import StageSpec

DEAREST_RUN = 2**31
"""Floating point operations of a forward pass that is still cheap; a core takes about 50 ms for them, and up to five
passes are made."""

LARGEST_RUN = 2**24
"""Parameters of a layer that is still cheap to build."""

Owner = TypeVar("Owner")
P = ParamSpec("P")


def _once(find: Callable[Concatenate[Owner, P], BatchEffects]) -> Callable[Concatenate[Owner, P], BatchEffects]:
    """`find`, which works out each answer once, and remembers it for as long as its first argument lives."""
    answers: WeakKeyDictionary[Owner, dict[object, BatchEffects]] = WeakKeyDictionary()

    @wraps(find)
    def ask(owner: Owner, /, *rest: P.args, **none: P.kwargs) -> BatchEffects:
        known = answers.setdefault(owner, {})
        if rest not in known:
            known[rest] = find(owner, *rest, **none)
        return known[rest]

    return ask


@_once
def behaviour(spec: StageSpec) -> BatchEffects:
    """What the module of a stage does with a batch in training."""
    with uncounted(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = [_of_layer(spec.network, i, shape) for i, shape in _frame_shapes(spec).items()]
    return BatchEffects(
        any(layer.draws for layer in found),
        next((layer.why_unsliceable for layer in found if layer.why_unsliceable), None),
    )


def _frame_shapes(spec: StageSpec) -> dict[int, tuple[int, ...]]:
    """Of the input of each layer, by its index in the network."""
    module, shapes = spec.build_module(0, torch.device("meta")).eval(), {}
    x = torch.empty(1, _shortest(module), *spec.frame_shape, device="meta")
    for index, layer in zip(spec.layers, module.layers.values(), strict=True):
        shapes[index] = tuple(x.shape[2:])
        if index + 1 in spec.layers:
            x = layer(x)
    return shapes


@_once
def _of_layer(network: Network, index: int, frame_shape: tuple[int, ...]) -> BatchEffects:
    """What a layer does, whatever the cut."""
    build = network.layers[index]
    without_values = _module(build, index, "meta")
    mixing = mixes_samples(without_values)
    shape = (_shortest(without_values), *frame_shape)
    try:
        seen, operations = _watch(build, index, shape)
    except Exception:  # a layer of anybody's, without values: whatever goes wrong, its names are left
        seen, operations = by_name(without_values), 0
    if mixing:
        return BatchEffects(seen.draws, ties_samples(mixing))
    parameters = sum(parameter.numel() for parameter in without_values.parameters())
    if operations > DEAREST_RUN or parameters > LARGEST_RUN:
        return seen
    try:
        found = _try(build, index, shape)
    except Exception:  # on noise, which it may not be made for
        return seen
    return BatchEffects(seen.draws or found.draws, found.why_unsliceable)


def _watch(build: Callable[[], Layer], index: int, shape: tuple[int, ...]) -> tuple[BatchEffects, int]:
    with FakeTensorMode(allow_fallback_kernels=False):
        module = _module(build, index, "cpu")
        return observe_operations(module, partial(_outputs, module), torch.empty(2, *shape))


def _try(build: Callable[[], Layer], index: int, shape: tuple[int, ...]) -> BatchEffects:
    module = _module(build, index, "cpu")
    name = path_and_class(f"layers.{index}", module.layers[str(index)])
    return tried(module, partial(_outputs, module), shape, name)


def _module(build: Callable[[], Layer], index: int, device: str) -> Module:
    """The layer alone, in training mode."""
    return Module({index: with_first_weights(build, 0, device)}).train()


def _outputs(module: Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, np.full(len(x), x.shape[1]))[1]


def _shortest(module: Module) -> int:
    """Fewest frames that give an output."""
    return next(frames for frames in itertools.count(1) if module.out_length(frames) >= 1)


def check_shareable(specs: Sequence[StageSpec], ranks: Ranks) -> None:
    """Raises ConfigError that names the first module whose samples act on each other, where there are several ranks."""
    for spec in specs if ranks.count > 1 else ():
        why = behaviour(spec).why_unsliceable
        if why:
            raise ConfigError(
                f"Stage {spec.stage}: {why}, so {ranks.count} processes cannot share its batches; train it in one, without "
                "torchrun."
            )

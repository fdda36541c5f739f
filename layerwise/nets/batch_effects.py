"""What a layer does in training that matters when a batch is sliced into micro-batches, or goes through the layer twice.

It is found in two ways. A forward pass of fake tensors takes as long for a huge layer as for a small one, but does not show
which samples an output depends on. Forward passes of two samples show that too, and are made where they are cheap.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from layerwise.nets.module import Module
from layerwise.nets.network import Network, memoised_per, with_first_weights, without_values

MOST_OPERATIONS = 2**31
"""Floating point operations of a forward pass that is still cheap; a core takes about 50 ms for them, and up to five
passes are made."""

MOST_PARAMETERS = 2**24
"""Parameters of a layer that is still cheap to build."""


@dataclass(frozen=True, slots=True)
class BatchEffects:
    """What a layer or a stage does with a batch in training."""

    uses_randomness: bool
    """Whether the forward pass draws random numbers."""
    why_unsliceable: str | None
    """Why a batch goes through it once and whole, as in "layers.1.unit.1 (BatchNorm2d) ties the samples of a batch
    together". None where the outputs of slices are those of the batch, and the same at every pass."""
    repeatable: bool = True
    """Whether a second pass gives the same outputs once its buffers have their old values again."""
    changes_parameters: bool = False
    """Whether the forward pass writes into parameters, or puts others in their place; through `.data` too, which torch does
    not count as a change."""


@memoised_per(Network)
def module_effects(network: Network, layers: range, frame_shape: tuple[int, ...]) -> BatchEffects:
    """What the module of these layers does, whatever the device. frame_shape: of its input. Runs on the CPU."""
    module = without_values(network, layers)
    x = torch.empty(1, _shortest_input(module), *frame_shape, device="meta")
    effects = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for index, layer in zip(layers, module.layers.values(), strict=True):
            effects.append(_layer_effects(network, index, tuple(x.shape[2:])))
            if index + 1 in layers:
                x = layer(x)
    reasons = [layer.why_unsliceable for layer in effects if layer.why_unsliceable]
    return BatchEffects(
        any(layer.uses_randomness for layer in effects),
        next(iter(reasons), None),
        all(layer.repeatable for layer in effects),
        any(layer.changes_parameters for layer in effects),
    )


def _shortest_input(module: Module) -> int:
    """Fewest frames that give an output."""
    return next(frames for frames in itertools.count(1) if module.out_length(frames) >= 1)


@memoised_per(Network)
def _layer_effects(network: Network, index: int, frame_shape: tuple[int, ...]) -> BatchEffects:
    """What a layer does, whatever the cut."""

    def build(device: str) -> Module:
        """The layer alone, in training mode."""
        return Module({index: with_first_weights(network.layers[index], 0, device)}).train()

    unfilled = without_values(network, range(index, index + 1))
    shape = (_shortest_input(unfilled), *frame_shape)
    try:
        effects, operations = _effects_on_fake_tensors(build, shape)
    except Exception:  # a layer of anybody's, without values: unless two samples tell more, it may do anything
        why = f"layer {index} of the network cannot be tried without values"
        effects, operations = BatchEffects(True, why, repeatable=False, changes_parameters=True), 0
    batch_norm = find_batch_norm(unfilled)
    if batch_norm:
        return replace(effects, why_unsliceable=_ties_samples(batch_norm))
    parameters = sum(parameter.numel() for parameter in unfilled.parameters())
    if operations > MOST_OPERATIONS or parameters > MOST_PARAMETERS:
        return effects
    try:
        on_samples = _effects_on_two_samples(build("cpu"), index, shape)
    except Exception:  # on noise, which it may not be made for
        return effects
    return replace(
        on_samples,
        uses_randomness=effects.uses_randomness or on_samples.uses_randomness,
        changes_parameters=effects.changes_parameters or on_samples.changes_parameters,
    )


def _outputs(module: Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, np.full(len(x), x.shape[1]))[1]


def _ties_samples(part: str) -> str:
    """The reason to keep a batch whole. part: as `_path_and_class` names it."""
    return f"{part} ties the samples of a batch together"


def _changes_tensor(module: nn.Module, tensor: str) -> str:
    """The reason to run a batch once. tensor: path of the buffer or parameter that a forward pass changes."""
    path, _, field = tensor.rpartition(".")
    return f"{_path_and_class(path, module.get_submodule(path))} changes its '{field}' at every forward pass"


def _path_and_class(path: str, part: nn.Module) -> str:
    """As in "layer1.0.bn1 (BatchNorm2d)"."""
    return f"{path} ({type(part).__name__})".lstrip()


def find_batch_norm(module: nn.Module) -> str | None:
    """Path and class of the first submodule with statistics of the batch, as in "layer1.0.bn1 (BatchNorm2d)".

    Batch normalisation takes its statistics from the whole batch, so they depend on how the batch is sliced; running
    statistics depend on the order of the slices. None where there is no such submodule.
    """
    for path, part in module.named_modules():
        for function in _called_functions(part):
            if "batch_norm" in function or "instance_norm" in function:
                return f"{path} ({function})".lstrip()
        if isinstance(part, _BatchNorm) or (isinstance(part, _InstanceNorm) and part.track_running_stats):
            return _path_and_class(path, part)
    return None


def _called_functions(part: nn.Module) -> list[str]:
    """Names of the functions that a traced module calls."""
    if not isinstance(part, fx.GraphModule):
        return []
    calls = (node.target for node in part.graph.nodes if node.op in ("call_function", "call_method"))
    return [call if isinstance(call, str) else getattr(call, "__name__", str(call)) for call in calls]


def _effects_on_fake_tensors(build: Callable[[str], Module], shape: tuple[int, ...]) -> tuple[BatchEffects, int]:
    """What a layer does with samples of this shape (L, *frame), and the floating point operations that it takes."""
    with FakeTensorMode(allow_fallback_kernels=False):
        module = build("cpu")
        before = _parameters_and_buffers(module)
        storages = {path: tensor.untyped_storage()._cdata for path, tensor in before.items()}
        with FlopCounterMode(display=False) as counter, _OperationLog() as log:
            _outputs(module, torch.empty(2, *shape))
        after = _parameters_and_buffers(module)
    changed = [
        path
        for path, tensor in before.items()
        if storages[path] in log.written
        or tensor.untyped_storage()._cdata != storages[path]
        or after.get(path) is not tensor
    ]
    if changed:
        return _changing(module, changed, before, log.uses_randomness), counter.get_total_flops()
    return BatchEffects(log.uses_randomness, None), counter.get_total_flops()


def _changing(
    module: Module, changed: list[str], before: dict[str, torch.Tensor], uses_randomness: bool
) -> BatchEffects:
    """Of a forward pass that changes these parameters and buffers. before: all of them."""
    buffers = dict(module.named_buffers())
    # A step puts back the values of buffers, where they are the same tensors still.
    repeatable = all(path in buffers and buffers[path] is before.get(path) for path in changed)
    parameters = any(isinstance(before.get(path), nn.Parameter) for path in changed)
    return BatchEffects(uses_randomness, _changes_tensor(module, changed[0]), repeatable, parameters)


def _parameters_and_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _OperationLog(TorchDispatchMode):
    """Notes whether an operation draws random numbers, and the storages that operations write into."""

    def __init__(self) -> None:
        super().__init__()
        self.uses_randomness = False
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        values = {argument.name: argument.default_value for argument in arguments}
        values |= {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        # Fused attention is called random whatever its rate.
        self.uses_randomness |= torch.Tag.nondeterministic_seeded in func.tags and values.get("dropout_p") != 0
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensors = (value for value in tree_iter(values.get(argument.name)) if isinstance(value, torch.Tensor))
                self.written.update(tensor.untyped_storage()._cdata for tensor in tensors)
        return func(*args, **kwargs)


FAR = (1.0,)
NEAR = (1e-4, 3e-5, 1e-5)
"""How far one sample is moved, to see whether the other one's outputs move. Near, where random numbers are drawn: RReLU
draws for negative values only, so a sample whose signs change moves what others draw; all of the moves must agree."""

ROUNDING = 1e-3
"""Of the largest output: slices of another size are added up in another order."""

Run = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""A forward pass that begins with the same random numbers each time: samples (B, L, *frame) to outputs with a row per
sample, and the state of the generator after it."""


def _effects_on_two_samples(module: Module, index: int, shape: tuple[int, ...]) -> BatchEffects:
    """What a layer does with samples of this shape (L, *frame). Leaves the module and the CPU's generator changed.

    The samples are of opposite sign, so that what happens to positive or to negative values alone does happen.
    """
    start = torch.get_rng_state()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.set_rng_state(start)
        return _outputs(module, x.clone()), torch.get_rng_state()

    sample, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    batch = torch.stack([sample, -sample])
    tensors, before = _parameters_and_buffers(module), _state(module)
    outputs, end = run(batch)
    uses_randomness = not torch.equal(start, end)
    after = _state(module)
    changed = [path for path in before | after if path not in after or not _equal(after[path], before.get(path))]
    if changed:
        return _changing(module, changed, tensors, uses_randomness)
    name = _path_and_class(f"layers.{index}", module.layers[str(index)])
    if not _close(run(batch)[0], outputs):
        return BatchEffects(uses_randomness, f"{name} gives other outputs at every forward pass", repeatable=False)

    def moves_the_first(other: torch.Tensor) -> bool:
        """Whether another second sample changes the outputs of the first one, though as much is drawn."""
        moved, moved_end = run(other)
        return torch.equal(moved_end, end) and not _equal(moved[0], outputs[0])

    others = [torch.stack([sample, far * noise - sample]) for far in (NEAR if uses_randomness else FAR)]
    if all(moves_the_first(other) for other in others):
        return BatchEffects(
            uses_randomness, _ties_samples(_first_part_that_ties(module, run, batch, others[0]) or name)
        )
    # Each slice draws its own, so there is nothing to compare where anything is drawn.
    if not uses_randomness and not _sliceable(run, batch, outputs):
        return BatchEffects(uses_randomness, _ties_samples(name))
    return BatchEffects(uses_randomness, None)


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Values of the buffers, and versions of the parameters, which count their changes; by path."""
    values = {path: buffer.clone() for path, buffer in module.named_buffers()}
    return values | {path: torch.tensor(parameter._version) for path, parameter in module.named_parameters()}


def _sliceable(run: Run, batch: torch.Tensor, outputs: torch.Tensor) -> bool:
    """Whether samples that go through alone come out as in their batch."""
    try:
        alone = [run(sample[None])[0] for sample in batch]
    except (RuntimeError, ValueError):
        return False  # made for several samples, as batch normalisation is
    return _close(torch.cat(alone), outputs)


def _first_part_that_ties(module: nn.Module, run: Run, batch: torch.Tensor, other: torch.Tensor) -> str | None:
    """Path and class of the first part whose outputs for the first sample differ though its inputs do not."""
    calls = zip(_calls_of_parts(module, run, batch), _calls_of_parts(module, run, other), strict=False)
    for (path, inputs, outputs), (other_path, other_inputs, other_outputs) in calls:
        if path == other_path and _all_equal(inputs, other_inputs) and not _all_equal(outputs, other_outputs):
            return _path_and_class(path, module.get_submodule(path))
    return None


Call = tuple[str, list[torch.Tensor], list[torch.Tensor]]
"""Path of a part, and of its inputs and its outputs the first half: the first of two samples."""


def _calls_of_parts(module: nn.Module, run: Run, x: torch.Tensor) -> list[Call]:
    """The calls of a module's parts in a forward pass, in the order in which they end."""
    calls: list[Call] = []

    def note(path: str, _: nn.Module, inputs: object, outputs: object) -> None:
        calls.append((path, _first_half(inputs), _first_half(outputs)))

    hooks = [part.register_forward_hook(partial(note, path)) for path, part in module.named_modules()]
    run(x)
    for hook in hooks:
        hook.remove()
    return calls


def _first_half(values: object) -> list[torch.Tensor]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.dim())
    return [tensor[: len(tensor) // 2].clone() for tensor in tensors]


def _all_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(_equal, some, others))


def _equal(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """To the bit, but for the bits of NaN."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = float(other.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(one, other, rtol=ROUNDING, atol=ROUNDING * largest, equal_nan=True)

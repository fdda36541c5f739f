"""Whether the units of a network compute what it does: both see noise, and a difference is refused with its name.

In evaluation on one sample; in training on two, and the gradients too, where that is cheap. It finds what a recording cannot
show: a forward that hangs on the size of the batch, on the time or on earlier calls, and a gradient that is changed on its way.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from layerwise.errors import ConfigError
from layerwise.nets.kernels import same_attention

TOLERANCE = 1e-4
"""Of the largest value. The operations are the same, so no more than rounding is between the two."""

MOST_OPERATIONS = 2**32
"""Floating point operations of one sample up to which training is compared too: it takes about a second then."""


HANGS_ON = (
    "Its forward hangs on something that cannot be recorded, such as the size of the batch, an earlier call or Python's random "
    "numbers; move that into an nn.Module of its own, or take it out."
)


@dataclass(frozen=True, slots=True)
class Pass:
    """What came of a forward pass, and of a backward pass where there was one."""

    calls: list[tuple[str, torch.Tensor]]
    """The parts in the order in which they ended, by their paths, each with the sum and the norm of what it gave."""
    output: torch.Tensor
    gradients: dict[int, torch.Tensor | None]
    """By the ids of the parameters."""


def reads_ids(unit: fx.GraphModule) -> bool:
    """Whether the first unit of a network turns its input into whole numbers before anything else."""
    (placeholder,) = unit.graph.find_nodes(op="placeholder")
    return any(node.op == "call_method" and node.target == "long" for node in placeholder.users)


def check_units(model: nn.Module, units: Sequence[fx.GraphModule], example: torch.Tensor) -> None:
    """Raises ConfigError, naming the first part that differs, unless the units one after another give what the model gives.

    example (N, *frame): the shape, type and device of the input. Model and units stay as they are.
    """
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices=devices), same_attention():
        whole = _own_copy(model).eval()
        x, operations = _trial(whole, units, example)
        _compare(whole, units, x)  # its second call, so that what hangs on earlier ones is seen
        if operations <= MOST_OPERATIONS:
            _compare(_own_copy(model).train(), units, _inputs(model, units, example, 2))


def _trial(model: nn.Module, units: Sequence[fx.GraphModule], example: torch.Tensor) -> tuple[torch.Tensor, int]:
    """One sample of noise, or what else the model takes, and the floating point operations that it takes for a sample.

    Raises ConfigError where it takes nothing of this shape.
    """
    error: Exception | None = None
    one, three = (_inputs(model, units, example, samples) for samples in (1, 3))
    for x in (one, three, torch.zeros_like(one)):
        try:
            with torch.no_grad(), _Operations() as operations:
                model(x.clone())
        except Exception as raised:
            error = raised
        else:
            return x, operations.total // len(x)
    raise ConfigError(
        f"The network fails on frames of {' x '.join(map(str, example.shape[1:]))}, noise and zeros alike "
        f"({_reason(error)}); it has to run on the CPU as it is."
    ) from error


class _Operations(TorchDispatchMode):
    """Counts those of matrix products, convolutions and attention; torch's own counter puts hooks on modules."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def _inputs(model: nn.Module, units: Sequence[fx.GraphModule], example: torch.Tensor, samples: int) -> torch.Tensor:
    """Noise; or, where whole numbers are read, such as every table of the model has a row for."""
    generator = torch.Generator().manual_seed(0)
    shape = (samples, *example.shape[1:])
    if reads_ids(units[0]):
        rows = min((part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)), default=2)
        return torch.randint(rows, shape, generator=generator).to(example.device)
    return torch.randn(shape, generator=generator).to(example)


def _compare(model: nn.Module, units: Sequence[fx.GraphModule], x: torch.Tensor) -> None:
    """In the mode of the model, which may be changed."""
    training = model.training
    when = "in training" if training else "in evaluation"
    # In training with weights of their own, as in a run: what is not part of the units keeps to those of the model.
    weights = {} if training else {id(parameter): parameter for parameter in model.parameters()}
    parts = [copy.deepcopy(unit, weights).train(training) for unit in units]
    paths = {str(node.target) for unit in units for node in unit.graph.find_nodes(op="call_module")}
    try:
        expected = _passed([model], x, paths, training)
    except Exception as error:
        raise ConfigError(
            f"The network fails on {len(x)} samples of noise {when} ({_reason(error)}); it has to run on the CPU as it is."
        ) from error
    try:
        found = _passed(parts, x, paths, training)
    except Exception as error:
        raise ConfigError(
            f"The stages of the network fail {when} where it does not ({_reason(error)}). {HANGS_ON}"
        ) from error
    if not _close(expected.output, found.output):
        place = _first_difference(model, expected, found)
        raise ConfigError(
            f"The stages of the network would not give what it gives {when}: from {place} on, they differ. {HANGS_ON}"
        )
    known = [value for value in expected.gradients.values() if value is not None]
    largest = max((float(value.abs().max()) for value in known), default=0.0)
    for name, parameter in model.named_parameters():
        gradient = expected.gradients.get(id(parameter))
        learnt = found.gradients.get(id(weights.get(id(parameter))))
        if gradient is not None and (learnt is None or not _close(gradient, learnt, largest)):
            raise ConfigError(
                f"The stages of the network would learn otherwise than it does: the gradient of '{name}' differs. A hook, a "
                "torch.autograd.Function or a forward that was put in place of another cannot be recorded; move it into an "
                "nn.Module of its own, or take it out."
            )


def _reason(error: Exception | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"


def _own_copy(module: nn.Module) -> nn.Module:
    """With the same parameters, and buffers of its own."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _passed(modules: Iterable[nn.Module], x: torch.Tensor, paths: set[str], training: bool) -> Pass:
    """One pass through the modules, one after another. paths: of the parts that are watched; training: with gradients."""
    calls: list[tuple[str, torch.Tensor]] = []

    def note(path: str, _: nn.Module, inputs: object, outputs: object) -> None:
        given = [value.detach().double() for value in tree_leaves(outputs) if isinstance(value, torch.Tensor)]
        totals = [total for value in given for total in (value.sum(), value.norm())]
        calls.append((path, torch.stack(totals) if totals else torch.zeros(0)))

    parameters: dict[int, nn.Parameter] = {}
    torch.manual_seed(0)
    with torch.set_grad_enabled(training):
        x = x.clone()
        for module in modules:
            for path, part in module.named_modules():
                if path in paths:
                    part.register_forward_hook(partial(note, path))
            parameters |= {id(value): value for value in module.parameters() if value.requires_grad}
            x = module(x)
        output = getattr(x, "last_hidden_state", x)
    if not output.requires_grad:
        return Pass(calls, output, {})
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    gradients = torch.autograd.grad(output, [*parameters.values()], direction, allow_unused=True)
    return Pass(calls, output.detach(), dict(zip(parameters, gradients, strict=True)))


def _close(one: torch.Tensor, other: torch.Tensor, largest: float = 0.0) -> bool:
    """largest: of the values among which these are."""
    if one.shape != other.shape:
        return False
    largest = max(largest, float(one.nan_to_num(0, 0, 0).abs().max())) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)


def _first_difference(model: nn.Module, expected: Pass, found: Pass) -> str:
    """The first part that gives something else; calls of which nothing came are not made again by the units."""
    for (path, given), (other_path, other) in zip(expected.calls, found.calls, strict=False):
        if path != other_path or not _close(given, other):
            return f"'{path}' ({type(model.get_submodule(path)).__name__})"
    return f"what stands behind '{expected.calls[-1][0]}'" if expected.calls else "the first line"

"""Records the forward of any nn.Module with torch.fx: its operations, in order, with the shape and place of each."""

import contextlib
import copy
import inspect
import linecache
import logging
import operator
import os
import traceback
from collections.abc import Iterable, Iterator
from functools import partialmethod
from itertools import chain, zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_unflatten

from layerwise.errors import ConfigError

BATCH = 7919
"""Samples in the batch of shapes that is sent through a network: a prime that no other axis is likely to have."""

TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def recorded(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, list[fx.Node]]:
    """A copy of the model that shares its tensors, and its operations from input to output, parameters left out."""
    _check_input(model, example)
    root = _sharing_copy(model)
    with torch.random.fork_rng(devices=[]):
        evaluation = _graph(_sharing_copy(model).eval())
        graph = _graph(root.train())
        _follow_mode(graph, evaluation)
        _note_shapes(root, graph, example)
    for module, original in zip(root.modules(), model.modules(), strict=True):
        module.training = original.training
    return root, [node for node in graph.nodes if node.op != "get_attr"]


def _check_input(model: nn.Module, example: torch.Tensor) -> None:
    if not isinstance(example, torch.Tensor):
        raise ConfigError(
            f"The network's input is a {type(example).__name__}, but modules read one tensor; "
            "wrap the network so that its forward takes a tensor."
        )
    for name, part in model.named_modules():
        if any(is_lazy(tensor) for tensor in chain(part.parameters(recurse=False), part.buffers(recurse=False))):
            raise ConfigError(
                f"The network's '{name}' ({type(part).__name__}) does not know its size yet; call the network once on an "
                "example before, or name the size."
            )
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    if len(required) > 1:
        raise ConfigError(
            f"The network's forward takes several inputs ({', '.join(required)}), but modules read one tensor; "
            "wrap the network so that its forward takes one."
        )


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy to record and to cut: torch.fx leaves constants on what it records."""
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    except Exception as error:
        raise ConfigError(
            f"The network cannot be copied ({_reason(error)}); give one that copy.deepcopy takes."
        ) from error


class TracedValue(fx.Proxy):
    """A value while recording. Unlike fx.Proxy it records x += y as what it does, not as x + y."""

    def _in_place(self, name: str, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", in_place, (name, self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(TracedValue, f"__{_name}__", partialmethod(TracedValue._in_place, _name))


def in_place(name: str, x: Any, y: Any) -> Any:
    """The operator of this name, as in "iadd"; torch.fx writes operator.iadd as a statement, which is wrong for sizes."""
    return getattr(operator, name)(x, y)


class _Tracer(fx.Tracer):
    """Records operations with the source line where each stands."""

    # Buffers are read when a unit runs, and changed only then.
    proxy_buffer_attributes = True

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[nn.Module | fx.Proxy]]:
        """The network's one input; all other arguments of its forward keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The value of an operation."""
        return TracedValue(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Raises TypeError in a block whose effect torch.fx would silently leave out."""
        if not torch.is_grad_enabled():
            raise TypeError("torch.no_grad() is not recorded, use .detach() instead")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise TypeError("torch.autocast() is not recorded, convert with .to() instead")
        node = super().create_node(*args, **kwargs)
        node.meta["line"] = _source_line(traceback.walk_stack(None))
        return node


def _graph(root: nn.Module) -> fx.Graph:
    """The operations of the network's forward in its present mode."""
    state = torch.get_rng_state()
    try:
        with torch.enable_grad():
            graph = _Tracer().trace(root)
    except Exception as error:
        line = _source_line(reversed(list(traceback.walk_tb(error.__traceback__))))
        if isinstance(error, fx.proxy.TraceError):
            raise ConfigError(
                f"The network's forward decides or loops by the value or size of a tensor{line}, so its operations "
                "are not known beforehand; choose with torch.where, decide in __init__, or check with torch._assert."
            ) from error
        raise ConfigError(
            f"The network's forward cannot be recorded by torch.fx{line}: {_reason(error)}. "
            "Write that line with tensor operations on the input."
        ) from error
    if not torch.equal(state, torch.get_rng_state()):
        raise ConfigError(
            "The network's forward draws random numbers that do not depend on its input, and they would be frozen; "
            "draw them with torch.rand_like or torch.randn_like."
        )
    graph.eliminate_dead_code(is_impure_node=lambda node: not _only_looks(node))
    return graph


def _only_looks(node: fx.Node) -> bool:
    """Whether an operation without users can go: others may change a tensor in place or draw random numbers."""
    return node.op == "get_attr" or node.target in (getattr, operator.getitem, "size", "dim")


def _follow_mode(graph: fx.Graph, evaluation: fx.Graph) -> None:
    """Makes constants that were `self.training` follow the mode of the unit, as in F.dropout(x, 0.1, self.training)."""
    for node, other in zip_longest(list(graph.nodes), list(evaluation.nodes)):
        if node is None or other is None or (node.op, node.target) != (other.op, other.target):
            raise _mode_error(node or other)
        constants, structure = tree_flatten((node.args, node.kwargs))
        others, other_structure = tree_flatten((other.args, other.kwargs))
        if structure != other_structure:
            raise _mode_error(node)
        for index, pair in enumerate(zip(constants, others, strict=True)):
            if pair == (True, False):
                with graph.inserting_before(node):
                    constants[index] = graph.get_attr("training")
            elif repr(pair[0]) != repr(pair[1]):
                raise _mode_error(node)
        node.args, node.kwargs = tree_unflatten(constants, structure)


def _mode_error(node: fx.Node) -> ConfigError:
    return ConfigError(
        f"The network does other operations in training than in evaluation, from {description(node)} on; "
        "put the difference into a module that has a mode, such as nn.Dropout, or switch the auxiliary branch off."
    )


class _Shapes(fx.Interpreter):
    """Sends the shape of a batch through the network, without computing anything."""

    def __init__(self, root: nn.Module, graph: fx.Graph, frame_shape: tuple[int, ...]) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.shape = " x ".join(map(str, frame_shape)) or "one number"
        self.extra_traceback = False
        self.versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Raises ConfigError, naming the operation, where it fails."""
        try:
            value = super().run_node(n)
        except Exception as error:
            why = _reason(error).replace(str(BATCH), "N")
            raise ConfigError(
                f"The network fails at {description(n)} for N frames of {self.shape}: {why}. "
                "Give it frames of the shape that it was made for, channels first (data.frame_length steps make one), and "
                "operations whose shapes do not depend on values."
            ) from error
        if isinstance(value, torch.Tensor):
            self.versions[n] = value._version
        entering = next(iter(self.env), n)
        if entering is not n and not self.cacheable(entering):
            raise ConfigError(
                f"The network changes its input in place at {description(n)}, so a batch could be read only once; "
                "use the operation that gives a new tensor."
            )
        return value

    def cacheable(self, node: fx.Node) -> bool:
        """Whether a value can be handed from one unit to the next: a tensor with a row per sample, never changed later.

        A unit that changed its input in place would spoil the batch for whoever reads it a second time.
        """
        value = self.env[node]
        return _has_row_per_sample(value) and value._version == self.versions[node]


def _note_shapes(root: nn.Module, graph: fx.Graph, example: torch.Tensor) -> None:
    """Notes which values can be cached. Raises ConfigError where the network's input or output cannot."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Left real, tensors of one element would be computed with, and counters of batches would count.
    tensors = chain(root.parameters(), root.buffers())
    shapes = _Shapes(
        copy.deepcopy(root, {id(tensor): mode.from_tensor(tensor) for tensor in tensors}),
        graph,
        tuple(example.shape[1:]),
    )
    with torch.no_grad(), mode, _without_torch_s_log():
        output = shapes.run(torch.empty(BATCH, *example.shape[1:], dtype=example.dtype, device=example.device))
        for node in graph.nodes:
            node.meta["cacheable"] = shapes.cacheable(node)
    _check_output(output)


@contextlib.contextmanager
def _without_torch_s_log() -> Iterator[None]:
    """Where an operation does not take a shape, torch logs a traceback besides raising what becomes our sentence."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _has_row_per_sample(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.shape[:1] == (BATCH,)


def _check_output(output: Any) -> None:
    """Raises ConfigError unless the output is one tensor with a row per sample."""
    if not isinstance(output, torch.Tensor):
        kind = type(output).__name__.removeprefix("immutable_")
        raise ConfigError(
            f"The network's forward gives a {kind}, but a module hands on one tensor; "
            "wrap the network so that its forward returns the tensor that you want to go on with."
        )
    if not _has_row_per_sample(output):
        shape = ", ".join("N" if size == BATCH else str(size) for size in output.shape)
        raise ConfigError(
            f"The network gives ({shape}) for N samples, but a module hands on one row per sample; "
            "wrap the network so that the batch comes first in its output."
        )


def description(node: fx.Node) -> str:
    """What an operation is called and where it stands."""
    if node.op == "placeholder":
        return "the network's input"
    if node.op == "output":
        return "the network's output"
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return f"'{name}'{node.meta.get('line', '')}"


def _source_line(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The line of the network's source that is executed, given frames from the innermost on; empty if it has none."""
    for frame, number in frames:
        path = frame.f_code.co_filename
        if frame.f_code is _graph.__code__:
            break
        if path != __file__ and not path.startswith(TORCH):
            return f" ({Path(path).name}, line {number}: `{linecache.getline(path, number).strip()}`)"
    return ""


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__

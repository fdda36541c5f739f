"""Records the forward of any nn.Module: its operations in order, as it runs once on tensors without values.

Sizes are known while it runs, and values are not: a forward may decide and loop by sizes and settings, never by values. Only
the size of the batch stays open. A module of torch.nn is one operation, and so is any other whose inside cannot be recorded:
where gradients or autocast are switched, or where it does other things in training than in evaluation.
"""

import contextlib
import copy
import linecache
import logging
import operator
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.errors import ConfigError
from layerwise.nets.kernels import same_attention
from layerwise.nets.mode import follow_mode
from layerwise.nets.operations import PLAIN, description, plain_name
from layerwise.nets.refusals import NotRecorded, check_model

BATCH = 7919
"""Samples in the batch of shapes that is sent through a network: a prime that no other axis is likely to have. Numbers that it
divides hang on the batch."""

TORCH = f"{Path(torch.__file__).parent}{os.sep}"

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)
"""Modules of torch.nn whose parts are recorded instead."""

READS = {
    "item",
    "tolist",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__complex__",
    "__array__",
    "equal",
}
"""Functions of a tensor that give its values to Python."""

UNSEEN = {
    "__set__": "sets an attribute of a tensor",
    "register_hook": "puts a hook on a tensor",
    "backward": "runs backward",
}
"""Functions whose effect no operation shows."""

DRAWS = 32
"""How often a decision by random numbers alone must come out the same."""


class WantsIds(Exception):
    """The network looks its input up in a table."""


def recorded(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, list[fx.Node]]:
    """A copy of the model that shares its tensors, and its operations from input to output.

    Parameters are left out, and so is what hangs on neither the input nor a parameter: constants, which whoever uses them
    makes anew. Each operation's `meta` says whether its value can be "cacheable", the path of the "modules" that it lies in,
    outermost first, and the "line" of source where it stands. Raises ConfigError where the model cannot be recorded.
    """
    if not isinstance(example, torch.Tensor):
        raise ConfigError(
            f"The network's input is a {type(example).__name__}, but modules read one tensor; "
            "wrap the network so that its forward takes a tensor."
        )
    check_model(model)
    root = sharing_copy(model)
    with torch.random.fork_rng(devices=[]), same_attention():
        try:
            graph = _graph(root, example)
        except WantsIds:
            graph = _graph(root, example, ids=True)
    for module, original in zip(root.modules(), model.modules(), strict=True):
        module.training = original.training
    return root, [node for node in graph.nodes if node.op != "get_attr" and not node.meta.get("free")]


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy that shares parameters and buffers. Raises ConfigError where the rest cannot be copied."""
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    except Exception as error:
        raise ConfigError(
            f"The network cannot be copied ({_reason(error)}); give one that copy.deepcopy takes."
        ) from error


def _graph(root: nn.Module, example: torch.Tensor, ids: bool = False) -> fx.Graph:
    """The operations, with as few parts kept whole as can be. ids: whether the input becomes int64 first."""
    whole = {path for path, part in root.named_modules() if path and _is_whole(part)}

    def record(training: bool) -> fx.Graph:
        root.train(training)
        return _Recorder(root, example, whole, ids).graph

    while True:
        try:
            evaluation, training = record(False), record(True)
            follow_mode(training, evaluation)
        except NotRecorded as error:
            kinds = {type(root.get_submodule(path)) for path in error.paths if path}
            # What one module does, others of its class do too.
            more = {path for path, part in root.named_modules() if path and type(part) in kinds} - whole
            if not more:
                raise
            whole |= more
        else:
            training.eliminate_dead_code(is_impure_node=lambda node: not node.meta.get("pure", node.op == "get_attr"))
            return training


def _is_whole(part: nn.Module) -> bool:
    in_torch = type(part).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(part, CONTAINERS)
    return in_torch or bool(part._backward_hooks or part._backward_pre_hooks)


class _Recorder(TorchFunctionMode):
    """Runs a copy of the network on fake tensors, and notes each function of torch that it calls."""

    def __init__(self, root: nn.Module, example: torch.Tensor, whole: set[str], ids: bool) -> None:
        """whole: paths of the modules that are one operation; ids: whether the input becomes int64 first."""
        super().__init__()
        self.graph = fx.Graph()
        self._root, self._whole, self._ids = root, whole, ids
        self._frame = " x ".join(map(str, example.shape[1:])) or "one number"
        self._device = example.device
        self._modules: list[str] = [""]
        self._inside: str | None = None
        """The path of the module whose inside is not recorded."""
        self._nodes: dict[int, fx.Node] = {}
        self._values: list[tuple[fx.Node, torch.Tensor, int]] = []
        """Each value with its version; kept, so that no other gets the same id."""
        self._lines: Counter[tuple[str, ...]] = Counter()
        """How many operations each line of each module has made."""
        self._effects = _Effects()
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        # Left real, tensors of one element would be computed with, and counters of batches would count.
        twin = copy.deepcopy(root, {id(t): fake.from_tensor(t) for t in chain(root.parameters(), root.buffers())})
        self._named: dict[int, tuple[str, torch.Tensor, int]] = {}
        for name, tensor in _tensors(twin):
            self._named.setdefault(id(tensor), (name, tensor, tensor._version))
        self._watch(twin)
        with fake, torch.enable_grad(), _without_torch_s_log():
            self._input = torch.empty(BATCH, *example.shape[1:], dtype=example.dtype, device=example.device)
            self._begin()
            self.graph.output(self._node_of_output(self._output(twin)))
        self._note_what_may_be_cached()

    def _output(self, twin: nn.Module) -> Any:
        try:
            with self:
                return twin(self._input.long() if self._ids else self._input)
        except (ConfigError, WantsIds):
            raise
        except Exception as error:
            line = _source_line(reversed(list(traceback.walk_tb(error.__traceback__))))
            if isinstance(error, DataDependentOutputException):
                raise self._decides(line) from error
            raise self._failure(f"'{self._inside or self._modules[-1] or 'forward'}'{line}", error) from error
        finally:
            if self._inside is not None:
                self._effects.__exit__(None, None, None)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside is not None:
            return func(*args, **kwargs)
        if func is torch.Tensor.__iter__:
            return iter(self.__torch_function__(torch.Tensor.unbind, types, args))
        name = getattr(func, "__name__", str(func))
        if name == "embedding":
            self._check_ids(args[0])
        self._effects.pure = True
        try:
            with self._effects:
                result = func(*args, **kwargs)
        except DataDependentOutputException as error:
            return self._value_of(func, args, kwargs, error)
        except Exception as error:
            line = _source_line(traceback.walk_stack(None))
            raise (
                self._decides(line) if name in READS else self._failure(f"'{plain_name(name)}'{line}", error)
            ) from error
        if any(isinstance(value, torch.Tensor) for value in _parts(result)):
            self._note(*self._as_node(func, name, args, kwargs), result)
        elif (
            name in UNSEEN
            and (name, args[1:]) != ("__set__", (True,))
            and any(isinstance(value, torch.Tensor) for value in _parts(args))
        ):
            raise self._not_recorded(UNSEEN[name])
        elif func is torch.Tensor.__setitem__:
            self._note("call_function", assigned, self._argument(args), {}, args[0])
        return result

    def _begin(self) -> None:
        """The input, and what is read off it: the size of the batch, and the device for what is made anew."""
        node = self.graph.placeholder("input")
        self._name(node, self._input)
        self._batch = self.graph.call_method("size", (node, 0))
        self._on = self.graph.call_function(getattr, (node, "device"))
        for read in (self._batch, self._on):
            read.meta |= {"free": True, "pure": True}

    def _watch(self, twin: nn.Module) -> None:
        """Has each module tell when it is called, and note itself where it is whole."""
        for path, part in twin.named_modules():

            def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                    self._check_ids(next(iter(args), None))
                if self._inside is None and path in self._whole:
                    self._call = self._argument(args), self._argument(kwargs)
                    self._inside, self._effects.pure = path, True
                    self._effects.__enter__()
                elif self._inside is None:
                    self._modules.append(path)

            def after(module: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
                if self._inside == path:
                    self._effects.__exit__(None, None, None)
                    self._inside = None
                    self._note("call_module", path, *self._call, result)
                elif self._inside is None:
                    self._modules.pop()

            part.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            part.register_forward_hook(after, with_kwargs=True)

    def _as_node(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
        """How a call stands in a graph."""
        if name == "__get__":
            return "call_function", getattr, self._argument((args[0], func.__self__.__name__)), {}
        args, kwargs = self._argument(args), self._argument(kwargs)
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = self._on
        if is_tensor_method_or_property(func):
            return "call_method", name, args, kwargs
        return "call_function", func, args, kwargs

    def _note(self, op: str, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Adds an operation, whose arguments are those of a graph."""
        line = _source_line(traceback.walk_stack(None))
        used = [node.meta["value"] for node in _nodes((args, kwargs)) if "value" in node.meta]
        if op == "call_module":
            used += self._root.get_submodule(target).parameters()
        if not torch.is_grad_enabled() and any(tensor.requires_grad for tensor in used):
            raise self._not_recorded("works without gradients, by torch.no_grad() or a torch.autograd.Function")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise self._not_recorded("works under torch.autocast()")
        modules = (*self._modules, target) if op == "call_module" else tuple(self._modules)
        self._lines[line, *modules] += 1
        if self._lines[line, *modules] >= BATCH:
            raise self._decides(line)
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta |= {"line": line, "modules": modules, "pure": self._effects.pure}
        self._name(node, result)
        if self._input._version:
            raise ConfigError(
                f"The network changes its input in place at {description(node)}, so a batch could be read only once; "
                "use the operation that gives a new tensor."
            )

    def _name(self, node: fx.Node, value: Any) -> None:
        """Has the node stand for the value, and further ones for the tensors in it."""
        if isinstance(value, torch.Tensor):
            node.meta["value"] = value
            self._values.append((node, value, value._version))
            if id(value) not in self._named:
                self._nodes[id(value)] = node
            return
        if not any(isinstance(part, torch.Tensor) for part in _parts(value)):
            return
        entries = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        if len(entries) >= BATCH:
            raise self._decides(node.meta["line"])
        for key, entry in entries:
            if any(isinstance(part, torch.Tensor) for part in _parts(entry)):
                part = self.graph.call_function(operator.getitem, (node, key))
                part.meta |= {name: node.meta[name] for name in ("line", "modules")} | {"pure": True}
                self._name(part, entry)

    def _argument(self, value: Any) -> Any:
        """A value as it stands in a graph, where tensors are the operations that gave them."""
        if isinstance(value, torch.Tensor):
            return self._node_of(value)
        if isinstance(value, torch.device):
            return self._on if value == self._device else value
        if isinstance(value, int) and not isinstance(value, bool | Enum) and value and value % BATCH == 0:
            return self._times_batch(value // BATCH)
        if isinstance(value, Mapping):
            return {key: self._argument(entry) for key, entry in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._argument, (value.start, value.stop, value.step)))
        if isinstance(value, tuple | list):
            return (tuple if isinstance(value, tuple) else list)(map(self._argument, value))
        if isinstance(value, PLAIN):
            return value
        if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a number of NumPy's
            return self._argument(value.item())
        raise self._not_recorded(f"hands a {type(value).__name__} to an operation")

    def _times_batch(self, factor: int) -> fx.Node:
        if factor == 1:
            return self._batch
        node = self.graph.call_function(operator.mul, (self._batch, factor))
        node.meta |= {"free": True, "pure": True}
        return node

    def _node_of(self, tensor: torch.Tensor) -> fx.Node:
        if (node := self._nodes.get(id(tensor))) is not None:
            return node
        name, _, version = self._named.get(id(tensor), ("", tensor, tensor._version))
        if not name:
            if isinstance(tensor, nn.Parameter):
                raise ConfigError(
                    f"The network's forward uses a parameter that it does not list{_source_line(traceback.walk_stack(None))}, "
                    "so it would never be trained; keep parameters in nn.ParameterList, and modules in nn.ModuleList."
                )
            if hasattr(tensor, "fake_mode") or tensor.requires_grad:
                raise self._not_recorded("uses a tensor that no function of torch has given")
            name = f"_tensor_constant{len(self._nodes)}"  # of the program around
            setattr(self._root, name, tensor)
        node = self._nodes[id(tensor)] = self.graph.get_attr(name)
        node.meta |= {"value": tensor, "pure": True}
        self._values.append((node, tensor, version))
        return node

    def _value_of(self, func: Callable[..., Any], args: Any, kwargs: Any, error: Exception) -> Any:
        """What a function gives of tensors that hang on no value of the network: on constants, or on random numbers that
        always lead to the same."""
        arguments, found = self._argument((args, kwargs)), []

        def real(node: fx.Node) -> Any:
            if node in (self._batch, self._on):
                return 2 if node is self._batch else torch.device("cpu")
            if node.op not in ("call_function", "call_method"):
                raise self._decides(_source_line(traceback.walk_stack(None))) from error
            its_args, its_kwargs = fx.map_arg((node.args, node.kwargs), real)
            if node.op == "call_method":
                return getattr(its_args[0], str(node.target))(*its_args[1:], **its_kwargs)
            return node.target(*its_args, **its_kwargs)  # type: ignore[operator]

        with unset_fake_temporarily():
            for _ in range(DRAWS):
                real_args, real_kwargs = fx.map_arg(arguments, real)
                found.append(func(*real_args, **real_kwargs))
        if any(repr(other) != repr(found[0]) for other in found):
            raise self._not_recorded("decides by random numbers")
        return found[0]

    def _check_ids(self, ids: Any) -> None:
        if isinstance(ids, torch.Tensor) and ids.is_floating_point() and not self._ids:
            raise WantsIds

    def _node_of_output(self, output: Any) -> fx.Node:
        """Raises ConfigError unless the output is one tensor with a row per sample; of Hugging Face's, the last states."""
        output = getattr(output, "last_hidden_state", output)
        if not isinstance(output, torch.Tensor):
            raise ConfigError(
                f"The network's forward gives a {type(output).__name__}, but a module hands on one tensor; "
                "wrap the network so that its forward returns the tensor that you want to go on with."
            )
        if output.shape[:1] != (BATCH,):
            shape = ", ".join("N" if size == BATCH else str(size) for size in output.shape)
            raise ConfigError(
                f"The network gives ({shape}) for N samples, but a module hands on one row per sample; "
                "wrap the network so that the batch comes first in its output."
            )
        return self._node_of(output)

    def _note_what_may_be_cached(self) -> None:
        """A tensor with a row per sample that is never changed later: a unit that changed its input would spoil the batch for
        whoever reads it a second time. And what is free: made of nothing that the network learns or is given."""
        unchanged = {node for node, value, version in self._values if value._version == version}
        for node, value, _ in self._values:
            node.meta["cacheable"] = node in unchanged and _has_row_per_sample(value)
        for node in self.graph.nodes:
            value = node.meta.pop("value", None)
            node.meta.setdefault("cacheable", False)
            if node.op == "get_attr":
                node.meta["free"] = node in unchanged and not isinstance(value, nn.Parameter)
            elif node.op in ("call_function", "call_method") and "free" not in node.meta:
                still = value is None or node in unchanged
                of_free = all(used.meta.get("free") for used in node.all_input_nodes)
                node.meta["free"] = bool(of_free and still and node.meta["pure"])

    def _not_recorded(self, what: str) -> NotRecorded:
        line = _source_line(traceback.walk_stack(None))
        return NotRecorded(
            [self._modules[-1]],
            f"The network's forward cannot be recorded: it {what}{line}; move what stands there into an nn.Module of its own, "
            "which is kept whole, or write it with tensor operations on the input.",
        )

    def _decides(self, line: str) -> ConfigError:
        return ConfigError(
            f"The network's forward decides or loops by the value of a tensor, or sample by sample{line}, so its operations "
            "are not known beforehand; choose with torch.where, decide in __init__, or check with torch._assert."
        )

    def _failure(self, what: str, error: Exception) -> ConfigError:
        why = _reason(error).replace(str(BATCH), "N")
        return ConfigError(
            f"The network fails at {what} for N frames of {self._frame}: {why}. "
            "Give it frames of the shape that it was made for, channels first (data.frame_length steps make one, pictures have "
            "sides of data.picture), and operations whose shapes do not depend on values."
        )


class _Effects(TorchDispatchMode):
    """Notes whether an operation draws random numbers or writes into a tensor."""

    pure = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        writes = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        self.pure &= not writes and torch.Tag.nondeterministic_seeded not in func.tags
        return func(*args, **(kwargs or {}))


def assigned(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """x[index] = value as an operation that gives x."""
    x[index] = value
    return x


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes, by their paths."""
    for path, part in module.named_modules():
        own = chain(part._parameters.items(), part._buffers.items(), vars(part).items())
        yield from ((f"{path}.{name}".lstrip("."), value) for name, value in own if isinstance(value, torch.Tensor))


def _parts(value: Any) -> Iterator[Any]:
    """The values in tuples, lists and dicts."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for entry in value:
            yield from _parts(entry)
    else:
        yield value


def _nodes(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


def _has_row_per_sample(value: torch.Tensor) -> bool:
    return value.shape[:1] == (BATCH,) and value.is_floating_point()


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

"""Cuts any nn.Module into gradient-isolated units by recording its forward with torch.fx.

Wherever a single tensor is all that the rest of the network still needs, the network can be cut: that tensor is what
one unit hands on to the next, and what is cached between them.
"""

import copy
import inspect
import linecache
import operator
import os
import traceback
from collections.abc import Iterable
from functools import partial, partialmethod
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from layerwise.errors import ConfigError
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network

BATCH = 7919
"""Samples in the batch of shapes that is sent through a network: a prime that no other axis is likely to have."""

TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def trace(model: nn.Module, example: torch.Tensor) -> list[fx.GraphModule]:
    """The finest units that the model can be cut into, in order; called one after another they compute what it does.

    `example` (N, *frame) shows the shape, type and device of the input; nothing is computed. Each unit maps one tensor
    with a leading batch axis to one such tensor, holds parameters, shares them with the model, and names them as the
    model does. Units switch between training and evaluation by their own train() and eval(). The model stays as it is.

    Raises ConfigError, naming the operation and where it stands, for a forward that torch.fx cannot record (decisions
    by tensor values, for example), that takes several inputs, gives anything but one tensor with a row per sample, or
    does other operations in training than in evaluation. A model without a cut is one unit: see `why_uncut`.
    """
    root, nodes = _recorded(model, example)
    stops = _unit_stops(root, nodes)
    alive = _alive_after(nodes)
    values = [nodes[0], *(alive[stop][0] for stop in stops)]
    return [
        _unit(root, nodes[start + 1 : stop + 1], entering, leaving)
        for (start, stop), (entering, leaving) in zip(pairwise([0, *stops]), pairwise(values), strict=True)
    ]


def why_uncut(model: nn.Module, example: torch.Tensor) -> str:
    """One sentence that names the value or weight which forbids the most cuts, for a model with fewer than wanted.

    Raises ConfigError as `trace` does.
    """
    root, nodes = _recorded(model, example)
    holds = _holds_parameters(root, nodes)
    names = {id(tensor): name for name, tensor in chain(root.named_parameters(), root.named_buffers())}
    spans = {
        _description(node): sum(holds[stops.start + 1 : stops.stop + 1]) for node, stops in _lifetimes(nodes).items()
    } | {
        f"the weight '{names.get(tensor)}'": sum(holds[stops.start : stops.stop + 1])
        for tensor, stops in _tied(root, nodes).items()
    }
    longest = max(spans, key=spans.__getitem__)
    if spans[longest] < 2:
        return "The network is cut between all of its operations that hold parameters already; ask for fewer stages."
    return (
        f"Modules hand on a single tensor, but {longest} is needed across {spans[longest]} of the {sum(holds)} operations "
        "with parameters, so the network cannot be cut between these; ask for fewer stages, or change that part."
    )


def traced_network(model: nn.Module, frame_shape: tuple[int, ...]) -> Network:
    """The model as a network with one stage per unit, for frames of this shape (channels first).

    Its layers start from the model's present weights, whatever the seed. Raises ConfigError as `trace` does.
    """
    units = trace(model, torch.zeros(1, *frame_shape))
    layers = [partial(FrameUnit, unit, first=index == 0) for index, unit in enumerate(units)]
    return Network(layers, natural_cut=(1,) * len(layers))


class FrameUnit(Layer):
    """A copy of a unit on torch's default device, applied to every frame.

    Frames have their channels first. A unit's output (N, tokens, D) has them last, as in a transformer: it is handed
    on as (N, D, tokens), and the next unit turns it back; `first` marks the unit that reads the network's input as is.
    """

    def __init__(self, unit: fx.GraphModule, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.unit = _copied(unit)
        self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, *frame) to (B, L, *output frame)."""
        frames = x.flatten(0, 1)
        if frames.dim() == 3 and not self.first:
            # The unit may rely on the layout that the network itself would have given it, as .view() does.
            frames = frames.transpose(1, 2).contiguous()
        y = self.unit(frames)
        return (y.transpose(1, 2) if y.dim() == 3 else y).unflatten(0, x.shape[:2])


def _copied(unit: fx.GraphModule) -> fx.GraphModule:
    """The unit with tensors of its own on the default device; nothing else of that size is allocated there."""
    tensors = chain(unit.parameters(), unit.buffers())
    copied = copy.deepcopy(unit, {id(tensor): _tensor_copy(tensor) for tensor in tensors})
    copied._non_persistent_buffers_set = set(unit._non_persistent_buffers_set)
    for module in copied.modules():
        if isinstance(module, nn.RNNBase):  # packs the weights for cuDNN, as its constructor does
            module.flatten_parameters()
    return copied


@torch.no_grad()
def _tensor_copy(host: torch.Tensor) -> torch.Tensor:
    copied = torch.empty(host.shape, dtype=host.dtype)
    if not (copied.is_meta or isinstance(copied, FakeTensor)):
        copied.copy_(host)
    return nn.Parameter(copied, host.requires_grad) if isinstance(host, nn.Parameter) else copied


def _unit(root: nn.Module, nodes: list[fx.Node], entering: fx.Node, leaving: fx.Node) -> fx.GraphModule:
    """The operations of `nodes` as a module that maps the value of `entering` to that of `leaving`."""
    graph = fx.Graph()
    copies = {entering: graph.placeholder("input")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        copied(node)
    graph.output(copies[leaving])
    unit = fx.GraphModule(root, graph)
    saved = root.state_dict(keep_vars=True)
    for name, _ in unit.named_buffers(remove_duplicate=False):
        if name not in saved:
            *path, field = name.split(".")
            unit.get_submodule(".".join(path))._non_persistent_buffers_set.add(field)
    return unit


def _unit_stops(root: nn.Module, nodes: list[fx.Node]) -> list[int]:
    """Index of the last operation of each unit. What has no parameters goes with the unit before it, or the first."""
    holds = _holds_parameters(root, nodes)
    last = len(nodes) - 2
    candidates = [*_candidate_cuts(root, nodes), last]
    return [
        stop
        for stop, following in pairwise(candidates)
        if any(holds[: stop + 1]) and any(holds[stop + 1 : following + 1])
    ] + [last]


def _holds_parameters(root: nn.Module, nodes: list[fx.Node]) -> list[bool]:
    return [any(isinstance(tensor, nn.Parameter) for tensor in _tensors(root, node)) for node in nodes]


def _candidate_cuts(root: nn.Module, nodes: list[fx.Node]) -> list[int]:
    """Indices of the operations after which a single value is alive that can be cached, and no weight is used again."""
    tied = set(chain.from_iterable(_tied(root, nodes).values()))
    return [
        index
        for index, alive in enumerate(_alive_after(nodes))
        if 0 < index < len(nodes) - 2 and len(alive) == 1 and alive[0].meta["cacheable"] and index not in tied
    ]


def _alive_after(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """After each operation: the values that later ones still use."""
    alive: list[list[fx.Node]] = [[] for _ in nodes]
    for node, stops in _lifetimes(nodes).items():
        for index in stops:
            alive[index].append(node)
    return alive


def _lifetimes(nodes: list[fx.Node]) -> dict[fx.Node, range]:
    """Indices of the operations after which each value is alive."""
    index = {node: position for position, node in enumerate(nodes)}
    return {node: range(index[node], max((index[user] for user in node.users), default=0)) for node in nodes}


def _tied(root: nn.Module, nodes: list[fx.Node]) -> dict[int, range]:
    """By the id of each parameter and buffer: indices of the operations after which it is used again."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for tensor in _tensors(root, node):
            first.setdefault(id(tensor), index)
            last[id(tensor)] = index
    return {tensor: range(first[tensor], last[tensor]) for tensor in first}


def _tensors(root: nn.Module, node: fx.Node) -> list[torch.Tensor]:
    """Parameters, buffers and constants that an operation uses."""
    named = [operator.attrgetter(use.target)(root) for use in node.all_input_nodes if use.op == "get_attr"]
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        named += [*module.parameters(), *module.buffers()]
    return [tensor for tensor in named if isinstance(tensor, torch.Tensor)]


def _recorded(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, list[fx.Node]]:
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
        f"The network does other operations in training than in evaluation, from {_description(node)} on; "
        "put the difference into a module that has a mode, such as nn.Dropout, or switch the auxiliary branch off."
    )


class _Shapes(fx.Interpreter):
    """Sends the shape of a batch through the network, without computing anything."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self.versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Raises ConfigError, naming the operation, where it fails."""
        try:
            value = super().run_node(n)
        except Exception as error:
            raise ConfigError(
                f"The network fails at {_description(n)} for the input's shape: {_reason(error)}. "
                "Give it data of the shape that it was made for, and operations whose shapes do not depend on values."
            ) from error
        if isinstance(value, torch.Tensor):
            self.versions[n] = value._version
        entering = next(iter(self.env), n)
        if entering is not n and not self.cacheable(entering):
            raise ConfigError(
                f"The network changes its input in place at {_description(n)}, so a batch could be read only once; "
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
    shapes = _Shapes(copy.deepcopy(root, {id(tensor): mode.from_tensor(tensor) for tensor in tensors}), graph)
    with torch.no_grad(), mode:
        output = shapes.run(torch.empty(BATCH, *example.shape[1:], dtype=example.dtype, device=example.device))
        for node in graph.nodes:
            node.meta["cacheable"] = shapes.cacheable(node)
    _check_output(output)


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


def _description(node: fx.Node) -> str:
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

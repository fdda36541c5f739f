"""Cuts any nn.Module into gradient-isolated units.

Wherever a single tensor is all that the rest of the network still needs, the network can be cut: that tensor is what
one unit hands on to the next, and what is cached between them.
"""

import operator
from collections import defaultdict
from itertools import chain, pairwise

import torch
from torch import fx, nn

from layerwise.errors import ConfigError
from layerwise.nets.operations import description
from layerwise.nets.recording import recorded


def trace(model: nn.Module, example: torch.Tensor) -> list[fx.GraphModule]:
    """The finest units that the model can be cut into, in order; called one after another they compute what it does.

    `example` (N, *frame) shows the shape, type and device of the input; nothing is computed. Each unit maps one tensor
    with a leading batch axis to one such tensor, holds parameters that can be trained, shares them with the model, and
    names them as the model does. Units switch between training and evaluation by their own train() and eval(). The model
    stays as it is.

    Raises ConfigError, naming the operation and where it stands, for a forward that cannot be recorded (decisions by tensor
    values, for example), that takes several inputs, gives anything but one tensor with a row per sample, or does other
    operations in training than in evaluation; and for a model that has nothing to train. A model without a cut is one unit:
    see `why_uncut`.
    """
    return trace_named(model, example)[0]


def trace_named(model: nn.Module, example: torch.Tensor) -> tuple[list[fx.GraphModule], list[list[str]]]:
    """The same, and the paths of the modules that begin with each unit.

    They stand beside the units: what a unit holds is hashed, and older runs know their networks by the hash.
    """
    root, nodes = recorded(model, example)
    stops = _unit_stops(root, nodes)
    alive = _alive_after(nodes)
    values = [nodes[0], *(alive[stop][0] for stop in stops)]
    spans = [nodes[start + 1 : stop + 1] for start, stop in pairwise([0, *stops])]
    units = [_unit(root, span, *ends) for span, ends in zip(spans, pairwise(values), strict=True)]
    begins, seen = [], set[str]()
    for span in spans:
        with_weights = [node.meta["modules"] for node in span if _holds_parameters(root, node)]
        begins.append([path for path in with_weights[0] if path and path not in seen])
        seen.update(*with_weights)
    return units, begins


def why_uncut(model: nn.Module, example: torch.Tensor) -> str:
    """One sentence that names the value or weight which forbids the most cuts, for a model with fewer than wanted.

    Raises ConfigError as `trace` does.
    """
    root, nodes = recorded(model, example)
    holds = _are_trained(root, nodes)
    names = {id(tensor): name for name, tensor in chain(root.named_parameters(), root.named_buffers())}
    spans = {
        description(node): sum(holds[stops.start + 1 : stops.stop + 1]) for node, stops in _lifetimes(nodes).items()
    } | {
        f"the weight '{names.get(tensor)}'": sum(holds[stops.start : stops.stop + 1])
        for tensor, stops in _tied(root, nodes).items()
    }
    longest = max(spans, key=spans.__getitem__)
    if spans[longest] < 2:
        return "The network is cut between all of its operations that are trained already; ask for fewer stages."
    return (
        f"Modules hand on a single tensor, but {longest} is needed across {spans[longest]} of the {sum(holds)} operations "
        "that are trained, so the network cannot be cut between these; ask for fewer stages, or change that part."
    )


def _unit(root: nn.Module, nodes: list[fx.Node], entering: fx.Node, leaving: fx.Node) -> fx.GraphModule:
    """The operations of `nodes` as a module that maps the value of `entering` to that of `leaving`."""
    graph = fx.Graph()
    # What is read off the network's input, the size of the batch and the device, is that of the unit's.
    copies = dict.fromkeys((next(iter(entering.graph.nodes)), entering), graph.placeholder("input"))

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
    """Index of the last operation of each unit.

    What has no parameters goes with the unit before it, or the first; what has frozen ones alone with the unit behind it,
    whose gradients then need not run through it, or the last.
    """
    holds = [_holds_parameters(root, node) for node in nodes]
    trained = _are_trained(root, nodes)
    if not any(trained):
        raise ConfigError(
            "The network has nothing to train: it has no parameters, or all of them are frozen; give one that has some with "
            "requires_grad."
        )
    last = len(nodes) - 2
    candidates = [*_candidate_cuts(root, nodes), last]
    stops, start = [], 0
    for stop, following in pairwise(candidates):
        with_parameters = any(holds[: stop + 1]) and any(holds[stop + 1 : following + 1])
        if with_parameters and any(trained[start : stop + 1]) and any(trained[stop + 1 :]):
            stops.append(stop)
            start = stop + 1
    return [*stops, last]


def _holds_parameters(root: nn.Module, node: fx.Node) -> bool:
    return any(isinstance(tensor, nn.Parameter) for tensor in _tensors(root, node))


def _are_trained(root: nn.Module, nodes: list[fx.Node]) -> list[bool]:
    """Whether each operation has a parameter that is not frozen."""
    return [
        any(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in _tensors(root, node))
        for node in nodes
    ]


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
    last_use = {node: max((index[user] for user in node.users if user in index), default=0) for node in nodes}
    return {node: range(position, last_use[node]) for node, position in index.items()}


def _tied(root: nn.Module, nodes: list[fx.Node]) -> dict[int, range]:
    """By the id of each parameter and buffer: indices of the operations after which it is used again."""
    uses: dict[int, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        for tensor in _tensors(root, node):
            uses[id(tensor)].append(index)
    return {tensor: range(indices[0], indices[-1]) for tensor, indices in uses.items()}


def _tensors(root: nn.Module, node: fx.Node) -> list[torch.Tensor]:
    """Parameters, buffers and constants that an operation uses."""
    named = [operator.attrgetter(str(use.target))(root) for use in node.all_input_nodes if use.op == "get_attr"]
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        named += [*module.parameters(), *module.buffers()]
    return [tensor for tensor in named if isinstance(tensor, torch.Tensor)]

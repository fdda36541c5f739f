"""One graph for training and evaluation, made of what a forward does in each of them."""

import operator
from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from layerwise.nets.operations import PLAIN, description
from layerwise.nets.refusals import NotRecorded


def follow_mode(training: fx.Graph, evaluation: fx.Graph) -> None:
    """Makes constants that hang on `self.training` follow the mode of the unit, as in F.dropout(x, 0.1, self.training).

    Raises NotRecorded, with the paths of the modules that do more than that.
    """
    outlines = _outlines(training), _outlines(evaluation)
    differing = [path for path in outlines[0] | outlines[1] if outlines[0].get(path) != outlines[1].get(path)]
    pairs = list(zip_longest(list(training.nodes), list(evaluation.nodes)))
    if differing:
        other = (
            node or twin for node, twin in pairs if node is None or twin is None or _outline(node) != _outline(twin)
        )
        raise _mode_error(next(other), differing)
    for node, twin in pairs:
        if _outline(node) != _outline(twin):
            raise _mode_error(node, _owner(node))
        constants, structure = tree_flatten((node.args, node.kwargs))
        others, _ = tree_flatten((twin.args, twin.kwargs))
        for index, (constant, other) in enumerate(zip(constants, others, strict=True)):
            if repr(constant) == repr(other):
                continue
            if isinstance(constant, fx.Node) or not isinstance(constant, PLAIN) or not isinstance(other, PLAIN):
                raise _mode_error(node, _owner(node))
            with training.inserting_before(node):
                constants[index] = _by_mode(training, constant, other)
        node.args, node.kwargs = tree_unflatten(constants, structure)


def _by_mode(graph: fx.Graph, training: Any, evaluation: Any) -> fx.Node:
    mode = graph.get_attr("training")
    if training is True and evaluation is False:
        return mode
    chosen = graph.call_function(operator.getitem, ((evaluation, training), mode))
    chosen.meta |= {"free": True, "pure": True}
    return chosen


def _outlines(graph: fx.Graph) -> dict[str, list[object]]:
    """What each module itself does, by its path: the operations, without the constants among their arguments."""
    found: dict[str, list[object]] = defaultdict(list)
    for node in graph.nodes:
        if node.op != "get_attr" and "modules" in node.meta:
            (path,) = _owner(node)
            found[path].append(_outline(node))
    return found


def _outline(node: fx.Node) -> object:
    values, structure = tree_flatten((node.args, node.kwargs))
    return node.op, node.target, structure, [isinstance(value, fx.Node) for value in values]


def _owner(node: fx.Node) -> list[str]:
    """The path of the module whose line calls it."""
    modules = node.meta.get("modules", ("",))
    return [modules[-2 if node.op == "call_module" else -1]]


def _mode_error(node: fx.Node, paths: Iterable[str]) -> NotRecorded:
    return NotRecorded(
        paths,
        f"The network does other operations in training than in evaluation, from {description(node)} on; move the "
        "difference into an nn.Module of its own, which is kept whole, or switch the auxiliary branch off.",
    )

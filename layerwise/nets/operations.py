"""An operation of a recorded network: what it is called, and what may stand in it as it is."""

from enum import Enum
from types import EllipsisType

import torch
from torch import fx

PLAIN = (
    bool | int | float | complex | str | torch.dtype | torch.layout | torch.memory_format | Enum | EllipsisType | None
)
"""What stands in a graph as it is."""


def description(node: fx.Node) -> str:
    """What an operation is called and where it stands."""
    if node.op == "placeholder":
        return "the network's input"
    if node.op == "output":
        return "the network's output"
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return f"'{plain_name(name)}'{node.meta.get('line', '')}"


def plain_name(name: str) -> str:
    """As in "getitem" for "__getitem__"."""
    return name.strip("_") if name.startswith("__") else name

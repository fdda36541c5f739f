"""What a module does in training that matters when a batch is sliced, or goes through it twice."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Behaviour:
    """As one way of looking has found it: `by_name`, `watched` or `tried`."""

    draws: bool
    """Whether the forward pass draws random numbers."""
    why_whole: str | None
    """Why a batch goes through it once and whole, as in "layers.1.unit.1 (BatchNorm2d) ties the samples of a batch
    together". None where the outputs of slices are those of the batch, and the same at every pass."""


def ties_samples(part: str) -> str:
    """The reason to keep a batch whole. part: as `path_and_class` names it."""
    return f"{part} ties the samples of a batch together"


def changes_itself(module: nn.Module, tensor: str) -> str:
    """The reason to run a batch once. tensor: path of the buffer or parameter that a forward pass changes."""
    path, _, field = tensor.rpartition(".")
    return f"{path_and_class(path, module.get_submodule(path))} changes its '{field}' at every forward pass"


def path_and_class(path: str, part: nn.Module) -> str:
    """As in "layer1.0.bn1 (BatchNorm2d)"."""
    return f"{path} ({type(part).__name__})".lstrip()

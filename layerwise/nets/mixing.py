"""What a module does that matters when a batch is sliced: tie its samples together, draw random numbers."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


def mixes_samples(module: nn.Module) -> str | None:
    """Path and class of the first submodule that mixes samples in training, as in "layer1.0.bn1 (BatchNorm2d)".

    Batch normalisation takes its statistics from the whole batch, so they depend on how the batch is sliced; running
    statistics depend on the order of the slices. None where there is no such submodule.
    """
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) or (isinstance(part, _InstanceNorm) and part.track_running_stats):
            return f"{name} ({type(part).__name__})".lstrip()
    return None


def draws_at_random(module: nn.Module) -> bool:
    """Whether its forward pass may draw random numbers in training: some part has a dropout rate above 0."""
    rates = (getattr(part, name, None) for part in module.modules() for name in ("p", "dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)

"""What a module does that matters when a batch is sliced, as far as the names of its parts and functions tell.

Some is known by name alone: a part can be named before anything has run. For what is not, see `trying` and `watching`.
"""

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from layerwise.nets.behaviour import Behaviour, path_and_class, ties_samples

RANDOM = ("dropout", "rand", "bernoulli", "normal_", "rrelu", "fractional_max_pool", "dot_product_attention")
"""Parts of the names of functions that may draw."""


def by_name(module: nn.Module) -> Behaviour:
    """What the names say of a module."""
    mixing, changing = mixes_samples(module), _changes_itself(module)
    why = ties_samples(mixing) if mixing else changing and f"{changing} changes itself at every forward pass"
    return Behaviour(draws_at_random(module), why)


def mixes_samples(module: nn.Module) -> str | None:
    """Path and class of the first submodule that mixes samples in training, as in "layer1.0.bn1 (BatchNorm2d)".

    Batch normalisation takes its statistics from the whole batch, so they depend on how the batch is sliced; running
    statistics depend on the order of the slices. None where there is no such submodule.
    """
    for name, part in module.named_modules():
        for called in _calls(part):
            if "batch_norm" in called or "instance_norm" in called:
                return f"{name} ({called})".lstrip()
        if isinstance(part, _BatchNorm) or (isinstance(part, _InstanceNorm) and part.track_running_stats):
            return path_and_class(name, part)
    return None


def draws_at_random(module: nn.Module) -> bool:
    """Whether its forward pass may draw random numbers in training: some part has a dropout rate, or calls for them."""
    for part in module.modules():
        rates = (getattr(part, name, None) for name in ("p", "dropout"))
        if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return True
        if isinstance(part, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
            return True
        if any(word in called for called in _calls(part) for word in RANDOM):
            return True
    return False


def _changes_itself(module: nn.Module) -> str | None:
    """Path and class of the first part with a spectral norm, of either kind."""
    for name, part in module.named_modules():
        if any("SpectralNorm" in type(by).__name__ for by in (part, *part._forward_pre_hooks.values())):
            return path_and_class(name, part)
    return None


def _calls(part: nn.Module) -> list[str]:
    """Names of the functions that a traced module calls."""
    if not isinstance(part, fx.GraphModule):
        return []
    calls = (node.target for node in part.graph.nodes if node.op in ("call_function", "call_method"))
    return [call if isinstance(call, str) else getattr(call, "__name__", str(call)) for call in calls]

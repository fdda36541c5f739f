"""What a module does that matters when a batch is sliced: tie its samples together, draw random numbers."""

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


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
            return f"{name} ({type(part).__name__})".lstrip()
    return None


def draws_at_random(module: nn.Module) -> bool:
    """Whether its forward pass may draw random numbers in training: some part has a dropout rate, or calls for them."""
    for part in module.modules():
        rates = (getattr(part, name, None) for name in ("p", "dropout"))
        if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return True
        if any(word in called for called in _calls(part) for word in ("dropout", "rand", "bernoulli", "normal_")):
            return True
    return False


def _calls(part: nn.Module) -> list[str]:
    """Names of the functions that a traced module calls."""
    if not isinstance(part, fx.GraphModule):
        return []
    calls = (node.target for node in part.graph.nodes if node.op in ("call_function", "call_method"))
    return [call if isinstance(call, str) else getattr(call, "__name__", str(call)) for call in calls]

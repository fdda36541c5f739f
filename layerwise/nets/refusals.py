"""Networks that cannot be trained as they are given: one sentence for each kind, with the way out."""

import inspect
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from layerwise.errors import ConfigError

COMPUTED_WEIGHTS = {
    "torch.nn.utils.weight_norm": (
        "the old weight_norm",
        "take it off with torch.nn.utils.remove_weight_norm, and use torch.nn.utils.parametrizations.weight_norm",
    ),
    "torch.nn.utils.spectral_norm": (
        "the old spectral_norm",
        "take it off with torch.nn.utils.remove_spectral_norm, and use torch.nn.utils.parametrizations.spectral_norm",
    ),
    "torch.nn.utils.prune": ("a pruned weight", "make it permanent with torch.nn.utils.prune.remove"),
}
"""By the module of a hook that computes a weight before each call: what it is, and what to do. Where the computed tensor has
a gradient it cannot be copied, and at the root of a network there is no module that could be kept whole."""


class NotRecorded(ConfigError):
    """A part of the network runs, but what it does cannot be recorded."""

    def __init__(self, paths: Iterable[str], sentence: str) -> None:
        """paths: of the modules whose own lines these are."""
        super().__init__(sentence)
        self.paths = set(paths)


def check_model(model: nn.Module) -> None:
    """Raises ConfigError for a model that is compiled, scripted, wrapped, without values, not in float32, or not ready."""
    for path, part in model.named_modules():
        reason = next(_reasons(part, at_root=not path), None)
        if reason is not None:
            whose = (
                f"The network's '{path}' ({type(part).__name__})" if path else f"The network ({type(part).__name__})"
            )
            raise ConfigError(f"{whose} {reason}")
    for name, parameter in model.named_parameters():
        _check_dtype(name, parameter.dtype)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    if len(required) > 1:
        raise ConfigError(
            f"The network's forward takes several inputs ({', '.join(required)}), but modules read one tensor; "
            "wrap the network so that its forward takes one."
        )


def _reasons(part: nn.Module, at_root: bool) -> Iterator[str]:
    """Why a part cannot be recorded, by what it is; each continues "The network's 'a' (Linear)"."""
    if type(part).__name__ == "OptimizedModule":  # its class lies in torch._dynamo, which takes a second to import
        yield "is compiled, and only the module itself can be cut; give it as it was before torch.compile (its ._orig_mod)."
    if hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable"):
        yield "has a compiled forward, and only the module itself can be cut; give it as it was before torch.compile."
    if isinstance(part, torch.jit.ScriptModule):
        yield (
            "is scripted, and only the module itself can be cut; give it as it was before torch.jit.script or "
            "torch.jit.trace."
        )
    if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
        yield "is a wrapper for several devices; give the module inside (its .module): a run has --devices and torchrun."
    tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    if any(is_lazy(tensor) for tensor in tensors):
        yield "does not know its size yet; call the network once on an example before, or name the size."
    elif any(tensor.is_meta for tensor in tensors):
        yield "has no values (its device is meta); make it on the CPU, or give it values with to_empty and load_state_dict."
    config = getattr(part, "config", None)  # of Hugging Face's
    if getattr(config, "layerdrop", 0):
        yield "leaves layers out at random, and which there are must be known beforehand; set its config.layerdrop to 0."
    if getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0):
        yield "masks its input at random by other means than torch's; set its config.apply_spec_augment to False."
    attached = any(isinstance(value, torch.Tensor) and value.grad_fn is not None for value in vars(part).values())
    for hook in part._forward_pre_hooks.values():
        if (kind := COMPUTED_WEIGHTS.get(type(hook).__module__)) is not None and (attached or at_root):
            yield f"has {kind[0]}, whose computed tensor cannot be copied; {kind[1]}."


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        return
    kind = str(dtype).removeprefix("torch.")
    if dtype.is_complex:
        raise ConfigError(
            f"The network's '{name}' is {kind}, and weights are trained in float32; keep the two parts as one parameter of "
            "float32 with a last axis of 2, and let forward use torch.view_as_complex of it."
        )
    also = f", and compute in it with --precision {kind}" if kind in ("bfloat16", "float16") else ""
    raise ConfigError(
        f"The network's '{name}' is {kind}, and weights are trained in float32; give network.float(){also}."
    )

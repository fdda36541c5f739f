"""Copies of modules whose tensors are made anew on a device, and nothing else there.

First weights: drawn on the CPU and copied from there, so that a seed gives the same ones on every device."""

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeVar

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def copied(module: AnyModule, device: torch.device | None = None) -> AnyModule:
    """The module on the device (torch's default one where there is none given); the original is left as it is."""
    twin = copy.deepcopy(module, {id(tensor): _tensor_copy(tensor, device) for tensor in _tensors(module)})
    originals = dict(module.named_modules(remove_duplicate=False))
    for path, part in twin.named_modules():
        # torch.fx forgets which buffers are not saved.
        part._non_persistent_buffers_set = set(originals[path]._non_persistent_buffers_set)
        if isinstance(part, nn.RNNBase):  # packs the weights for cuDNN, as its constructor does
            part.flatten_parameters()
    return twin


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    attributes = chain.from_iterable(vars(part).values() for part in module.modules())
    plain = (value for value in attributes if isinstance(value, torch.Tensor))
    return chain(module.parameters(), module.buffers(), plain)


@torch.no_grad()
def _tensor_copy(original: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    twin = torch.empty(original.shape, dtype=original.dtype, device=device)
    if not (twin.is_meta or isinstance(twin, FakeTensor)):
        twin.copy_(original)
    return nn.Parameter(twin, original.requires_grad) if isinstance(original, nn.Parameter) else twin


def with_first_weights(build: Callable[[], AnyModule], seed: int, device: torch.device | str) -> AnyModule:
    """What `build` makes on torch's default device, on this one, initialised from the seed; no generator is changed."""
    device = torch.device(device)
    without_values = device.type == "meta" or detect_fake_mode() is not None
    with torch.random.fork_rng(devices=[]), torch.device(device if without_values else "cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        built = build()
    return built if without_values or device.type == "cpu" else copied(built, device)

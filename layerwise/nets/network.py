"""A network as a list of layers that are not built yet, and how it is cut into the modules of a run.

Layers are built one stage at a time, for the device where they are trained: the whole network never exists there.
Each layer is initialised from its own random stream, so its first weights do not depend on where the network is cut. They
are drawn on the CPU and copied to the device, so a seed gives the same ones on every device.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from layerwise.nets.layer import Layer
from layerwise.nets.module import Module

AnyModule = TypeVar("AnyModule", bound=nn.Module)
P = ParamSpec("P")
T = TypeVar("T")


def memoised_per(owner: type) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a function work out each answer once, and remember it for as long as its argument of this type lives.

    Where an argument has an attribute `alike`, all arguments with the same one share their answers. The function is given it by
    position; the others, or what they are alike in, must be hashable.
    """

    def memoised(function: Callable[P, T]) -> Callable[P, T]:
        answers: WeakKeyDictionary[Any, dict[Any, T]] = WeakKeyDictionary()

        @wraps(function)
        def remembered(*args: P.args, **kwargs: P.kwargs) -> T:
            others = tuple(getattr(arg, "alike", arg) for arg in args if not isinstance(arg, owner))
            key = others, tuple(sorted(kwargs.items()))
            owned = next(arg for arg in args if isinstance(arg, owner))
            of_owner = answers.setdefault(getattr(owned, "alike", owned), {})
            if key not in of_owner:
                of_owner[key] = function(*args, **kwargs)
            return of_owner[key]

        return remembered

    return memoised


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Network:
    """Layers from input to output, and the cut that the paper uses. Equal to itself alone: see `memoised_per`."""

    layers: Sequence[Callable[[], Layer]]
    """Each call builds one layer on torch's default device."""
    natural_cut: tuple[int, ...]
    """Number of layers in each of the paper's modules; sums to len(layers)."""
    identity: str = ""
    """A hash of what it computes and of its first weights, where options do not say it."""
    structure: str = ""
    """The same without its weights."""
    reads_ids: bool = False
    """Whether its input are whole numbers, such as those of words in a table."""
    why_no_finer: Callable[[], str] = str
    """A sentence on what forbids more layers, or nothing."""
    model: nn.Module | None = None
    """The module that it was recorded from, which keeps the weights; None where the layers are ours."""

    @property
    def natural_ranges(self) -> list[range]:
        """The layers of each of the paper's modules."""
        return ranges(self.natural_cut)

    def build(self, layers: range, seed: int, device: torch.device | str) -> Module:
        """The module of these layers on the device, with its first weights."""
        return Module(
            {index: with_first_weights(self.layers[index], weight_seed(seed, index), device) for index in layers}
        )


@memoised_per(Network)
def without_values(network: Network, layers: range) -> Module:
    """The module of these layers as shapes alone, in evaluation mode. All who ask for it are given the same one."""
    return Module({index: _layer_without_values(network, index) for index in layers}).eval()


@memoised_per(Network)
def _layer_without_values(network: Network, index: int) -> Layer:
    return with_first_weights(network.layers[index], 0, "meta")


def weight_seed(*key: int) -> int:
    """The seed of first weights, from the seed of the run and what they are for."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def ranges(sizes: Sequence[int]) -> list[range]:
    """Stages of so many layers each, as ranges of layers: [2, 1] to [range(0, 2), range(2, 3)]."""
    stops = np.cumsum(sizes).tolist()
    return [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def with_first_weights(build: Callable[[], AnyModule], seed: int, device: torch.device | str) -> AnyModule:
    """What `build` makes on torch's default device, on this one, initialised from the seed; no generator is changed."""
    device = torch.device(device)
    without_values = device.type == "meta" or detect_fake_mode() is not None
    with torch.random.fork_rng(devices=[]), torch.device(device if without_values else "cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        built = build()
    return built if without_values or device.type == "cpu" else copied(built, device)


def copied(module: AnyModule, device: torch.device | None = None) -> AnyModule:
    """A copy whose tensors are made anew on the device (torch's default one where there is none given), and nothing else
    there."""
    tensors = {id(tensor): tensor for _, tensor in named_tensors(module)}
    twin = copy.deepcopy(module, {key: _tensor_copy(tensor, device) for key, tensor in tensors.items()})
    originals = dict(module.named_modules(remove_duplicate=False))
    for path, part in twin.named_modules():
        # torch.fx forgets which buffers are not saved.
        part._non_persistent_buffers_set = set(originals[path]._non_persistent_buffers_set)
        if isinstance(part, nn.RNNBase):  # packs the weights for cuDNN, as its constructor does
            part.flatten_parameters()
        if isinstance(part, Layer) and device is not None and device.type == "cuda":
            part.arrange_for_gpu()
    return twin


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes, by each of their names."""
    attributes = (
        (f"{path}.{name}", value)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    )
    parameters = module.named_parameters(remove_duplicate=False)
    return chain(parameters, module.named_buffers(remove_duplicate=False), attributes)


@torch.no_grad()
def _tensor_copy(original: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    twin = torch.empty(original.shape, dtype=original.dtype, device=device)
    if not (twin.is_meta or isinstance(twin, FakeTensor)):
        twin.copy_(original)
    return nn.Parameter(twin, original.requires_grad) if isinstance(original, nn.Parameter) else twin

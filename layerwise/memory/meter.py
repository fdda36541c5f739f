"""Counts the bytes of live tensors on one device, and refuses to pass the budget.

`Meter` works on any device, so each promise about memory is tested without a GPU, and a peak is predicted by a rehearsal on
tensors without values. On CUDA the allocator counts every byte anyway, and `AllocatorMeter` reads its figures.
Only tensors that are made inside the `with` block, by this thread, count; numpy arrays and loader threads are the host's."""

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from layerwise.errors import BudgetError, ConfigError
from layerwise.memory.recurrence import FoldedFrames
from layerwise.memory.reserved import Allocations

Kind = Literal["parameters", "gradients", "optimizer", "activations"]
KINDS: tuple[Kind, ...] = ("parameters", "gradients", "optimizer", "activations")

METER_EVERY = 64
"""Steps of a known size between two that are metered: looking at every operation of a GRU on a CPU costs half a step."""


def host_tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor that shares its memory and does not count: it lies on the host, on a CPU too."""
    with _disable_current_modes():
        return torch.from_numpy(array)


def uncounted() -> contextlib.AbstractContextManager[object]:
    """What is made inside lies on the host, on a CPU too: no meter sees it."""
    return _disable_current_modes()


def metered(enabled: bool) -> contextlib.AbstractContextManager[object]:
    """Runs a step under the meter, or at full speed; a step at full speed must leave on the device what it found there."""
    return contextlib.nullcontext() if enabled else _disable_current_modes()


class Meter(TorchDispatchMode):
    """`live` and `peak` are bytes on the device; BudgetError where `live` would pass `limit`.

    A dispatch mode: it sees the output of every operation, forward and backward. A storage is counted once, from its first
    sight until it is freed.
    """

    allocations: Allocations | None = None
    """Takes down what is asked for, where somebody wants to know."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch wraps every dispatch in a guard for its compiler, which costs more than counting.
        return False

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        super().__init__()
        self.device_type = device.type
        self.limit = limit
        self.live = 0
        self.peak = 0
        self._live_by_kind = [0] * len(KINDS)
        self._peak_by_kind = [0] * len(KINDS)
        self._storages: dict[int, tuple[weakref.ref, int, int]] = {}
        self._steps: dict[str, _Steps] = {}

    @property
    def peak_by_kind(self) -> dict[Kind, int]:
        """Of what the peak was made, in bytes. Workspaces and gradients of activations count as activations."""
        return dict(zip(KINDS, self._peak_by_kind, strict=True))

    def reset_peak(self) -> None:
        """Starts a new peak from what is live now."""
        self.peak, self._peak_by_kind = self.live, self._live_by_kind.copy()

    def label(self, kind: Kind, tensors: Iterable[torch.Tensor | None]) -> None:
        """Says what these tensors are; what nobody labels is an activation."""
        to = KINDS.index(kind)
        for tensor in tensors:
            key = None if tensor is None else tensor.untyped_storage()._cdata
            if key in self._storages:
                reference, size, was = self._storages[key]
                self._live_by_kind[was] -= size
                self._live_by_kind[to] += size
                self._storages[key] = reference, size, to

    def should_meter(self, name: str, *sizes: int) -> bool:
        """Whether to meter the next of many like steps, whose memory depends on `sizes` alone; see `metered`.

        Yes unless a metered step of this name was at least as large in every size; for the first two, and now and then.
        """
        return self._steps.setdefault(name, _Steps()).should_meter(sizes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            # Of a fake tensor, torch asks for its device more often than for everything else together.
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._count(result)
        else:
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    self._count(value)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        size = storage.nbytes()
        if known is not None and known[1] == size:
            return
        kind = KINDS.index("activations")
        if known is not None:
            kind = known[2]
            self._release(key)
        self._storages[key] = (weakref.ref(storage, lambda _: self._release(key)), size, kind)
        self.live += size
        self._live_by_kind[kind] += size
        if self.allocations is not None:
            self.allocations.made(key, size)
        if self.live > self.peak:
            self.peak, self._peak_by_kind = self.live, self._live_by_kind.copy()
        if self.limit is not None and self.live > self.limit:
            raise BudgetError(
                f"The device holds {self.live:,} bytes, more than the budget of {self.limit:,} bytes; "
                "give a larger --gpu-mem, or a smaller --batch-size."
            )

    def _release(self, key: int) -> None:
        _, size, kind = self._storages.pop(key)
        self.live -= size
        self._live_by_kind[kind] -= size
        if self.allocations is not None:
            self.allocations.gone(key)


class RehearsalMeter(Meter):
    """Also takes down what is asked for, in which order."""

    allocations: Allocations

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        super().__init__(device, limit)
        self.allocations = Allocations()


class _Steps:
    """Which of many like steps are metered."""

    def __init__(self) -> None:
        self._count = 0
        self._seen: set[tuple[int, ...]] = set()
        """Sizes that were metered, without those that another one covers."""

    def should_meter(self, sizes: tuple[int, ...]) -> bool:
        self._count += 1
        covered = any(_covers(seen, sizes) for seen in self._seen)
        if not covered:
            self._seen = {seen for seen in self._seen if not _covers(sizes, seen)} | {sizes}
        return not covered or self._count <= 2 or self._count % METER_EVERY == 0


def _covers(larger: tuple[int, ...], smaller: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(larger, smaller, strict=True))


class AllocatorMeter:
    """Answers as `Meter` does, from the figures of CUDA's allocator, about tensors that are made after it is entered.

    It counts what tensors asked for; what the allocator rounds up and keeps in reserve comes on top, and `driver.cap` bounds
    both.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self._labelled: dict[Kind, int] = {}

    def __enter__(self) -> "AllocatorMeter":
        self._before = self._requested("current")
        self.reset_peak()
        return self

    def __exit__(self, *error: object) -> None:
        """The allocator counts on."""

    @property
    def live(self) -> int:
        return self._requested("current") - self._before

    @property
    def peak(self) -> int:
        return self._requested("peak") - self._before

    @property
    def peak_by_kind(self) -> dict[Kind, int]:
        """Parameters and optimizer as they were labelled, gradients at their most; the rest are activations."""
        labelled = {kind: self._labelled.get(kind, 0) for kind in KINDS}
        return labelled | {"activations": max(self.peak - sum(labelled.values()), 0)}

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def label(self, kind: Kind, tensors: Iterable[torch.Tensor | None]) -> None:
        """Gradients come one by one and go together, so they are taken as large as the parameters they belong to."""
        if kind != "gradients":
            storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
            # Once each: cuDNN has all weights of a recurrent layer in one.
            held = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
            self._labelled[kind] = max(held, self._labelled.get(kind, 0))
            if kind == "parameters":
                self._labelled["gradients"] = self._labelled[kind]

    def should_meter(self, name: str, *sizes: int) -> bool:
        """Never: the allocator counts every step."""
        return False

    def _requested(self, when: str) -> int:
        # Nested, as the allocator gives it: memory_stats would flatten and sort hundreds of numbers at every step.
        return torch.cuda.memory_stats_as_nested_dict(self._device)["requested_bytes"]["all"][when]


AnyMeter = Meter | AllocatorMeter


def meter_for(device: torch.device, limit: int | None) -> AnyMeter:
    """The meter of a device. limit: bytes at which it refuses; on CUDA the allocator's cap does that."""
    return AllocatorMeter(device) if device.type == "cuda" else Meter(device, limit)


REHEARSED_ON = torch.device("cpu")
"""Where rehearsals take place, whatever the device of the run: on fake CUDA tensors torch calls cuDNN's recurrent kernels
for real."""


@contextlib.contextmanager
def in_host_memory() -> Iterator[None]:
    """No meter counts what is made inside; in a rehearsal it has no values either."""
    fake = detect_fake_mode()
    with uncounted(), fake or contextlib.nullcontext():
        yield


@contextlib.contextmanager
def rehearsal(limit: int | None = None) -> Iterator[RehearsalMeter]:
    """What is built inside, on REHEARSED_ON, has no values; the meter that the block is given counts it.

    The tensors are torch's fake ones, with shapes alone: a step of a large network takes a fraction of a second, and the meter
    counts the very storages that it would count on the device. Raises BudgetError with the first byte beyond the limit.
    """
    collects = gc.isenabled()
    gc.disable()  # the collector looks at all that torch has imported, which takes a twelfth of the time of a plan
    try:
        with fake_tensors(), RehearsalMeter(REHEARSED_ON, limit) as meter, FoldedFrames(lambda: meter.live):
            yield meter
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors that are made inside have no values; what cannot do without these raises an error.

    Raises ConfigError where torch does not know what an operation makes of such tensors.
    """
    first_backward_pass()
    try:
        with FakeTensorMode(allow_fallback_kernels=False):
            yield
    except RuntimeError as error:
        if not isinstance(error, UnsupportedOperatorException) and "no fake impl" not in str(error):
            raise
        raise ConfigError(
            f"The memory of this run cannot be planned: torch {torch.__version__} does not know the shapes that come out of "
            f"one of its operations ({str(error).partition('. ')[0]}); take a newer torch, or, where the operation is your "
            "own, give it a function for torch.library.register_fake."
        ) from error


@cache
def first_backward_pass() -> None:
    """Once, before anything is done on fake tensors: torch would prepare for GPUs then, and the process could not be forked."""
    with uncounted():
        torch.zeros(1, requires_grad=True).sum().backward()

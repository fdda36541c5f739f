"""The device of a run: which one it is, what to do where it is full, and how tensors get onto it and off it again.

On a CPU the device is host memory itself; the meter alone tells the two apart (`memory.meter.uncounted`)."""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from layerwise.errors import BudgetError, ConfigError
from layerwise.memory.meter import uncounted

T = TypeVar("T")

OUT_OF_MEMORY = (
    "out of memory",  # CUDA itself, where it loads kernels
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",  # where there is no room for a handle
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "unable to find an engine to execute this computation",  # cuDNN, where no workspace is to be had
)
"""What libraries under torch and the driver say where the device is full, beside torch.OutOfMemoryError; in lower case."""


def find_device(name: str) -> torch.device:
    """auto: the first GPU, or the CPU where there is none. Raises ConfigError where the named GPU is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch {torch.__version__} sees no CUDA device; give --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0.")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def why_out_of_memory(error: BudgetError | RuntimeError) -> str:
    """What an error says, where it means that the device is full; any other error is raised again."""
    message = str(error)
    if isinstance(error, BudgetError | torch.OutOfMemoryError) or any(
        words in message.lower() for words in OUT_OF_MEMORY
    ):
        return message
    raise error


def halve_until_it_fits(work: Callable[[int], T], size: int, smallest: int, device: torch.device) -> T:
    """What work(size) gives, or with half as much, and so on, where the device runs out of memory.

    `work` goes on where an earlier attempt of it ended. Raises BudgetError where not even work(smallest) fits.
    """
    while True:
        try:
            return work(size)
        except (BudgetError, RuntimeError) as error:
            reason = why_out_of_memory(error)
        # Outside of the handler: while the error is known, so are the tensors of the attempt.
        if size <= smallest:
            raise BudgetError(reason)
        size = max(size // 2, smallest)
        release(device)


def once_more_where_full(work: Callable[[], T], device: torch.device) -> T:
    """What work() gives; where the device is full, what it gives when all that is free has been given back.

    `work` changes nothing before it has all the memory that it needs, or goes on where an earlier attempt of it ended.
    """
    try:
        return work()
    except (BudgetError, RuntimeError) as error:
        why_out_of_memory(error)
    release(device)
    return work()


def release(device: torch.device) -> None:
    """Gives back what no tensor holds any more: collects cycles, and returns free blocks to the driver and the system."""
    gc.collect()
    return_free_blocks(device)


def return_free_blocks(device: torch.device) -> None:
    """Gives free blocks back to the driver and the system."""
    heap = _glibc()
    if heap is not None:
        heap.malloc_trim(0)
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # they come from the allocator, and would count as tensors of ours
        torch.cuda.empty_cache()


def on_device(frames: torch.Tensor, device: torch.device, samples: slice = slice(None)) -> torch.Tensor:
    """Frames of some samples from the host as float32 on the device; a copy on a CPU too, so that it counts there."""
    return brought(frames, device, samples).float()


def brought(frames: torch.Tensor, device: torch.device, samples: slice = slice(None)) -> torch.Tensor:
    """The same in their own dtype."""
    with uncounted():
        part = frames[samples]
    # Without waiting, where the frames are pinned; what is done with them next waits by itself.
    return part.to(device, copy=True, non_blocking=frames.is_pinned())


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context that a forward pass runs in: float32, or autocast to a shorter type."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


@contextmanager
def offloaded(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Inside the block the tensors lie in host memory; behind it they are on the device again, with the same bits.

    A meter counts them as new ones.
    """
    with uncounted():
        on_host = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
    for tensor, _ in on_host:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=device)
    try:
        yield
    finally:
        for tensor, values in on_host:
            tensor.data = values.to(device, copy=True)


def pack_recurrent_weights(module: nn.Module) -> None:
    """Puts the weights of recurrent layers side by side again, as cuDNN wants them."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part.flatten_parameters()


def keep_dropout_from_cudnn(module: nn.Module) -> None:
    """Has recurrent layers with dropout computed without cuDNN wherever they train.

    cuDNN drops out by a generator of its own, which a second pass cannot set back, and whose state never leaves the device.
    """
    for part in module.modules():
        if isinstance(part, nn.RNNBase) and part.dropout:
            away = _AwayFromCudnn()
            part.register_forward_pre_hook(away.begin)
            part.register_forward_hook(away.end, always_call=True)


def keep_recurrence_in_float32(module: nn.Module) -> None:
    """Has recurrent layers computed in float32 wherever the rest is autocast to bfloat16.

    CUDA's autocast would give them float16 there (ATen/autocast_mode and cudnn/RNN.cpp), and nothing scales its gradients then.
    """
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            aside = _Float32()
            part.register_forward_pre_hook(aside.begin, with_kwargs=True)
            part.register_forward_hook(aside.end, always_call=True)


class _Float32:
    """Hooks around a layer's forward pass."""

    _autocast: torch.autocast | None = None

    def begin(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        kind = next(layer.parameters()).device.type
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != torch.bfloat16:
            return None
        self._autocast = torch.autocast(kind, enabled=False)
        self._autocast.__enter__()
        return tree_map_only(torch.Tensor, _widened, (args, kwargs))

    def end(self, *_: object) -> None:
        if self._autocast is not None:
            self._autocast.__exit__(None, None, None)
            self._autocast = None


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


class _AwayFromCudnn:
    """Hooks around a layer's forward pass."""

    def begin(self, layer: nn.Module, *_: object) -> None:
        self._was_enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = self._was_enabled and not layer.training

    def end(self, *_: object) -> None:
        torch.backends.cudnn.enabled = self._was_enabled


ARENA_MAX = -8
"""M_ARENA_MAX of glibc's malloc.h."""


def share_one_heap() -> None:
    """One heap for all threads of this process that are yet to come, so that the process does not grow with the run.

    glibc gives each thread a heap of its own, which keeps what the thread has freed. Threads that read ahead and write
    caches, new ones for every epoch and stage, so took 40 MB more for a hundredfold data set. No other C library is known
    to need it.
    """
    heap = _glibc()
    if heap is not None:
        heap.mallopt(ARENA_MAX, 1)


@cache
def _glibc() -> ctypes.CDLL | None:
    """None where the C library is another one."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None

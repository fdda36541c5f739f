"""The device of a run: which one it is, how much of it a process may take, and how tensors get onto it and off it again.

On a CPU the device is host memory itself; the meter alone tells the two apart (`memory.meter.uncounted`)."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import nn

from layerwise.errors import BudgetError, ConfigError
from layerwise.memory.meter import uncounted

T = TypeVar("T")

CUDA_WORKSPACE = 2 * 32 * 2**20
"""Bytes; what torch gives cuBLAS at most by default (on Hopper; 8 MiB elsewhere), forward and in autograd's own thread."""

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


def cap(device: torch.device, budget: int | None) -> None:
    """On CUDA the allocator itself refuses to pass the budget (bytes; None: all there is); elsewhere the meter does.

    The context counts too: what the driver's own tool shows for the process stays under the budget.
    """
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        tensors = total if budget is None else max(budget - context_bytes(device), 0)
        torch.cuda.set_per_process_memory_fraction(min(tensors / total, 1.0), device)


def context_bytes(device: torch.device) -> int:
    """What this process holds on the device beside tensors: CUDA's context and the kernels it has loaded; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    _load_kernels(device)
    return max(process_bytes(device) - torch.cuda.memory_reserved(device), 0)


@cache
def _load_kernels(device: torch.device) -> None:
    """CUDA loads kernels at their first use, into memory that no allocator sees: a tiny step of each kind loads them."""
    x = torch.randn(2, 32, 16, 16, device=device)
    layers = [nn.Conv2d(32, 32, 3), nn.GRU(14, 14, batch_first=True)]
    parameters = [parameter for layer in layers for parameter in layer.to(device).parameters()]
    picture = nn.functional.relu_(layers[0](x))
    rows = layers[1](picture.flatten(0, 1).flatten(0, 1).unflatten(0, (-1, 14)))[0].flatten(0, 1)
    rows = rows.index_select(0, torch.arange(0, len(rows), 2, device=device))
    torch.bmm(rows[None], rows.t()[None]).log_softmax(1).sum().backward()
    torch.optim.Adam(parameters, fused=True).step()
    torch.cuda.synchronize(device)
    del x, layers, parameters, picture, rows
    release(device)


def workspace_bytes(device: torch.device) -> int:
    """What CUDA's matrix products take of the allocator beside the tensors of a step; 0 on a CPU."""
    return CUDA_WORKSPACE if device.type == "cuda" else 0


def process_bytes(device: torch.device) -> int:
    """What the driver reports for this process; 0 on a CPU.

    Where the driver does not tell processes apart (containers hide them from it), all that is taken on the device: with
    others on it that is too much, and the cap is lower than it need be, never higher.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.init()
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    return _driver_figure(device) or total - free


def _driver_figure(device: torch.device) -> int | None:
    """NVML's figure for this process, or None where NVML or the process cannot be found."""
    try:
        import pynvml  # of the extra "gpu"
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)
    except pynvml.NVMLError:
        return None


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
    with uncounted():
        part = frames[samples]
    # Without waiting, where the frames are pinned; what is done with them next waits by itself.
    return part.to(device, copy=True, non_blocking=frames.is_pinned()).float()


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

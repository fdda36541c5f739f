"""What a CUDA device has for this process, as the driver sees it: the context, what is free, and the cap on the allocator.

On a CPU there is none of it, and the meter alone holds the budget.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from layerwise.memory.device import release
from layerwise.memory.reserved import Segments

MARGIN = 64 * 2**20
"""Bytes of a budget that plans leave free: CUDA loads the kernels of a stage when its first step runs, into memory that no
allocator sees, and cuDNN takes workspaces that no rehearsal sees."""

LARGEST_CONTEXT = 800 * 2**20
"""Bytes; what is taken on a device beyond it belongs to others, where the driver does not tell processes apart."""

CUBLAS_WORKSPACE, FROM_HOPPER_ON = (2 * 4096 + 8 * 16) * 2**10, 32 * 2**20
"""Bytes that torch gives cuBLAS, before compute capability 9 and from there on, in the thread that calls and in autograd's own;
CUBLAS_WORKSPACE_CONFIG says it otherwise (aten/src/ATen/cuda/CublasHandlePool.cpp)."""

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables by which the user sets the allocator."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a process has of a device; bytes."""

    context: int
    """CUDA's context and the kernels that it has loaded."""
    free: int | None = None
    """For tensors, where this was measured in another process; None: it is asked for."""


CARDS: dict[torch.device, Card] = {}
"""As they were measured last."""


def cap(device: torch.device, budget: int | None, segments: Segments | None = None, margin: int = MARGIN) -> None:
    """On CUDA the allocator itself refuses to pass the budget (bytes; None: all there is); elsewhere the meter does.

    The context counts too: what the driver's own tool shows for the process stays under the budget. segments: how the allocator
    reserves, None: as it does by itself; margin: bytes that are kept for kernels that are still to be loaded.
    """
    if device.type != "cuda":
        return
    segments = segments or possible_segments(device)[0] or Segments(expandable=False)
    context = context_bytes(device)  # measured now, whatever the budget: later that would disturb other figures
    _, total = torch.cuda.mem_get_info(device)
    allowed = total if budget is None else segments.allowed(budget - context - margin)
    if torch.cuda.memory_reserved(device) > allowed:
        torch.cuda.empty_cache()
    # Half a byte more: torch cuts off what is behind the point, and the last byte is needed.
    torch.cuda.set_per_process_memory_fraction(min((max(allowed, 0) + 0.5) / total, 1.0), device)


def cap_again(device: torch.device, budget: int | None, segments: Segments) -> None:
    """The same when kernels have been loaded: by the context as it is now.

    Where the driver does not tell processes apart, what has been taken since may be others', so the margin stays.
    """
    if device.type == "cuda" and budget is not None:
        figure = _driver_figure(device)
        if figure is not None:
            now = figure - torch.cuda.memory_reserved(device)
            CARDS[device] = Card(max(now, context_bytes(device)))
            cap(device, budget, segments, margin=0)


def room_for_tensors(device: torch.device, budget: int) -> int:
    """Bytes of a budget that a plan may have reserved: never more than the device has free for this process."""
    if device.type != "cuda":
        return budget
    return min(budget - context_bytes(device), free_for_tensors(device)) - MARGIN


def beside_tensors(device: torch.device) -> int:
    """Bytes of a budget that are not for tensors: on CUDA context and margin."""
    return context_bytes(device) + MARGIN if device.type == "cuda" else 0


def why_less_than_budget(device: torch.device, budget: int | None) -> str:
    """A sentence where the device has less free than the budget; else nothing."""
    if device.type != "cuda" or budget is None:
        return ""
    free = free_for_tensors(device) + context_bytes(device)
    if budget <= free:
        return ""
    return (
        f"--gpu-mem {budget / 1e6:g} MB is more than {device} has for this process, {free / 1e6:.0f} MB, and these are what "
        "counts."
    )


def segments_of(device: torch.device, expandable: bool) -> Segments | None:
    """How the device reserves memory; None on a CPU, where what tensors ask for is all that counts."""
    return Segments(expandable, _workspaces(device)) if device.type == "cuda" else None


def possible_segments(device: torch.device) -> Sequence[Segments | None]:
    """The ways in which it may be asked to: both, unless the user has set the allocator."""
    settings = " ".join(os.environ.get(name, "") for name in ALLOCATOR_SETTINGS)
    chosen = [False, True] if not settings.strip() else ["expandable_segments:true" in settings.lower()]
    return [segments_of(device, expandable) for expandable in chosen] if device.type == "cuda" else [None]


@contextmanager
def segments_used(device: torch.device, segments: Segments | None) -> Iterator[None]:
    """Inside, the allocator reserves new memory in this way, unless the user has set it."""
    changes = segments is not None and segments.expandable and len(possible_segments(device)) > 1
    if changes:
        _set_allocator("expandable_segments:True")
    try:
        yield
    finally:
        if changes:
            _set_allocator("expandable_segments:False")


def _set_allocator(settings: str) -> None:
    """As the environment variables do, while the process runs. torch 2.9 has another name for it."""
    names = ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings")
    next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))(settings)


def take_workspaces(device: torch.device) -> None:
    """Has cuBLAS take its workspaces now, before anything else is on the device: later they would come to lie in between."""
    if device.type == "cuda":
        matrix = torch.ones(8, 8, device=device, requires_grad=True)
        (matrix @ matrix).sum().backward()


def workspace_bytes(device: torch.device) -> int:
    """What CUDA's matrix products take of the allocator beside the tensors of a step; 0 on a CPU."""
    return sum(_workspaces(device)) if device.type == "cuda" else 0


def _workspaces(device: torch.device) -> tuple[int, ...]:
    size = FROM_HOPPER_ON if torch.cuda.get_device_capability(device) >= (9, 0) else CUBLAS_WORKSPACE
    configured = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    numbers = configured.removeprefix(":").split(":")
    if configured and len(numbers) % 2 == 0 and all(number.isdigit() for number in numbers):
        sizes = [int(number) for number in numbers]
        size = 2**10 * sum(kib * count for kib, count in zip(sizes[::2], sizes[1::2], strict=True))
    return (size,) * 2


def context_bytes(device: torch.device) -> int:
    """What this process holds on the device beside tensors: CUDA's context and the kernels it has loaded; 0 on a CPU.

    It is measured once; `cap_again` measures it anew. Other processes may come and go meanwhile, and are not ours.
    """
    if device.type != "cuda":
        return 0
    if device not in CARDS:
        _load_kernels(device)
        figure, reserved = _driver_figure(device), torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        taken = min(total - free - reserved, LARGEST_CONTEXT) if figure is None else figure - reserved
        CARDS[device] = Card(max(taken, 0))
    return CARDS[device].context


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


def process_bytes(device: torch.device) -> int:
    """What the driver reports for this process, or, where it does not tell processes apart, context and tensors; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return _driver_figure(device) or context_bytes(device) + torch.cuda.memory_reserved(device)


def free_for_tensors(device: torch.device) -> int:
    """Bytes that are free or in reserve."""
    known = CARDS[device].free if device in CARDS else None
    if known is not None:
        return known
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _driver_figure(device: torch.device) -> int | None:
    """NVML's figure for this process, or None where NVML or the process cannot be found: containers hide it, for example."""
    library = _nvml()
    if library is None:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    for kind in ("GPU", "MIG"):  # the second is a part of a card that several share
        try:
            handle = library.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
            processes = library.nvmlDeviceGetComputeRunningProcesses(handle)
        except library.NVMLError:
            continue
        own = next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
        if own is not None:
            return int(own)
    return None


@cache
def _nvml():  # type: ignore[no-untyped-def]
    """The library, or None without it or the extra "gpu"."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # of any kind that the library has
        return None
    return pynvml

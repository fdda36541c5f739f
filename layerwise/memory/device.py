"""The device of a run: which one, the hard cap on it, and how data gets there."""

import contextlib

import torch

from layerwise.errors import ConfigError


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
    """On CUDA the allocator itself refuses to pass the budget (bytes; None: all there is); elsewhere the meter does."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(1.0 if budget is None else min(budget / total, 1.0), device)


def on_device(frames: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Frames from the host as float32 on the device; a copy on a CPU too, so that it counts there as on a GPU."""
    return frames.to(device, copy=True).float()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context that a forward pass runs in: float32, or bfloat16 autocast."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)

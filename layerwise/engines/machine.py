"""The machine that a run works on, for its report."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from layerwise.version import __version__


def machine(device: torch.device) -> dict[str, Any]:
    """cpu, cores, memory_bytes, gpu, gpu_bytes (None without one), system, python, torch, layerwise."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu.name if gpu else None,
        "gpu_bytes": gpu.total_memory if gpu else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "layerwise": __version__,
    }


def _cpu_model() -> str:
    """Linux names it in a file; elsewhere the platform's word for it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())

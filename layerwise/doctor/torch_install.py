"""A script: prints, line by line as JSON, what torch and its companions say, and before each part what it is at.

Asks torch about itself in a process of its own: companions that do not match may end it, and a broken driver may hang it."""

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


def tell(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def tell_versions() -> bool:
    """Whether torch itself imports."""
    for name in ("torch", "torchvision", "torchaudio"):
        tell(at=name)
        try:
            tell(versions={name: str(import_module(name).__version__)})
        except Exception as error:  # ImportError, OSError and RuntimeError are what a mismatch has given so far
            tell(errors={name: (str(error).strip().splitlines() or [type(error).__name__])[0]})
    return "torch" in sys.modules


def tell_gpus() -> None:
    import torch

    tell(at="CUDA", cuda=torch.version.cuda)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
        except Exception as error:  # torch was built without CUDA, or finds no driver
            said = str(caught[0].message) if caught else str(error)
            tell(gpu_error=said.strip().splitlines()[0])
            return
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append({"name": torch.cuda.get_device_name(number), "free": free, "total": total})
    tell(gpus=gpus)


ANSWER_SECONDS = 120
"""Longest wait: a first import from a network disk takes a minute."""


@dataclass(slots=True)
class TorchReport:
    """What torch and its companions say."""

    versions: dict[str, str] = field(default_factory=dict)
    """torch, torchvision, torchaudio: those that import after torch."""
    errors: dict[str, str] = field(default_factory=dict)
    """The others, and what they say."""
    cuda: str | None = None
    """The CUDA that torch was built for, such as 13.0; None where it was built without."""
    gpus: list[dict[str, object]] = field(default_factory=list)
    """name, free and total (bytes) of each GPU that torch can use."""
    gpu_error: str = ""
    """Why it can use none, where it knows."""


def ask_torch() -> TorchReport:
    """What it says; a process that ends or hangs has its word in `errors`, under what it was at."""
    # -P, so that files beside the script are not taken for modules.
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS)
        output, end = done.stdout, f"ended its process with {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        output, end = said.decode(errors="replace"), f"did not answer for {ANSWER_SECONDS} s"
    return _gathered(output, end)


def _gathered(output: str, end: str) -> TorchReport:
    """end: how the process ended, empty where it ended well."""
    report, at = TorchReport(), "torch"
    for line in output.splitlines():
        if not line.startswith("{"):
            continue
        told = json.loads(line)
        at = told.pop("at", at)
        report.versions |= told.pop("versions", {})
        report.errors |= told.pop("errors", {})
        for name, value in told.items():
            setattr(report, name, value)
    if end and at == "CUDA":
        report.gpu_error = f"asking for the GPUs {end}"
    elif end:
        report.errors[at] = f"importing it {end}"
    return report


if __name__ == "__main__" and tell_versions():
    tell_gpus()

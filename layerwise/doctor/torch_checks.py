"""torch, its companions and the GPUs, whose driver is compared with what torch was built for.

torch is asked about itself in a process of its own: companions that do not match may end it, and a broken driver may hang it.
That process prints what they say as lines of JSON, and before each part what comes next.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from layerwise.doctor import Finding
from layerwise.importing import install_beside
from layerwise.units import size

REINSTALL = "in a checkout of layerwise: pip install -c constraints.txt ."

TORCH_SECONDS = 120
"""Longest wait for torch: a first import from a network disk takes a minute."""

TIMED_OUT = f"did not answer for {TORCH_SECONDS} s"

DRIVER_SECONDS = 30
"""Longest wait for nvidia-smi."""

_SCRIPT = "import sys; sys.path.append(sys.argv[1]); from layerwise.doctor import torch_checks; torch_checks.describe()"
"""What the other process runs: behind all that is installed, it looks for layerwise where this one has it from."""


@dataclass(slots=True)
class TorchReport:
    """What torch and its companions say."""

    versions: dict[str, str] = field(default_factory=dict)
    """torch, torchvision, torchaudio: those that import after torch."""
    errors: dict[str, str] = field(default_factory=dict)
    """The others, and what they say."""
    cuda: str | None = None
    """The CUDA that torch was built for, such as 13.0; None where it was built without."""
    gpus: list[dict[str, Any]] = field(default_factory=list)
    """name, free and total (bytes) of each GPU that torch can use."""
    gpu_error: str = ""
    """Why it can use none, where it knows."""
    timed_out: bool = False
    """Whether it had not said everything after TORCH_SECONDS."""


def ask_torch() -> TorchReport:
    """What the other process says; where it ends or hangs, `errors` says so, under the name of the part it was at."""
    # -P, so that files in this folder are not taken for modules.
    command = [sys.executable, "-P", "-c", _SCRIPT, str(Path(__file__).parents[2])]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=TORCH_SECONDS)
        output, end = done.stdout, f"ended its process with {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output, end = (error.stdout or b"").decode(errors="replace"), TIMED_OUT
    return _report(output, end)


def _report(output: str, end: str) -> TorchReport:
    """end: how the process ended, empty where it ended well."""
    report, at = TorchReport(timed_out=end == TIMED_OUT), "torch"
    for line in output.splitlines():
        if not line.startswith("{"):
            continue
        answer = json.loads(line)
        at = answer.pop("at", at)
        report.versions |= answer.pop("versions", {})
        report.errors |= answer.pop("errors", {})
        for name, value in answer.items():
            setattr(report, name, value)
    if end and at == "CUDA":
        report.gpu_error = f"asking for the GPUs {end}"
    elif end:
        report.errors[at] = f"importing it {end}"
    return report


def describe() -> None:
    """Prints a TorchReport, as lines of JSON with some of its fields each."""
    for name in ("torch", "torchvision", "torchaudio"):
        _print(at=name)
        try:
            _print(versions={name: str(import_module(name).__version__)})
        except Exception as error:  # ImportError, OSError and RuntimeError are what a mismatch has given so far
            _print(errors={name: (str(error).strip().splitlines() or [type(error).__name__])[0]})
    if "torch" in sys.modules:
        _describe_gpus()


def _describe_gpus() -> None:
    import torch

    _print(at="CUDA", cuda=torch.version.cuda)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
        except Exception as error:  # torch was built without CUDA, or finds no driver
            said = str(caught[0].message) if caught else str(error)
            _print(gpu_error=said.strip().splitlines()[0])
            return
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append({"name": torch.cuda.get_device_name(number), "free": free, "total": total})
    _print(gpus=gpus)


def _print(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


COMPANIONS = {
    "torchvision": "the sets cifar10 and stl10 and networks of torchvision",
    "torchaudio": "recordings whose rate is not data.sample_rate",
}
"""What needs them; everything else works without."""


def torch(report: TorchReport) -> Finding:
    if report.timed_out and "torch" not in report.versions:
        advice = "a slow disk or a busy machine; if `python -c 'import torch'` never ends, " + REINSTALL
        return Finding("torch", "note", TIMED_OUT, advice)
    if error := report.errors.get("torch"):
        return Finding("torch", "fix", f"does not import: {error}", REINSTALL)
    if "torch" not in report.versions:
        return Finding("torch", "fix", "said nothing", REINSTALL)
    built = f"built for CUDA {report.cuda}" if report.cuda else "built without CUDA"
    return Finding("torch", "ok", f"{report.versions['torch']}, {built}")


def companions(report: TorchReport) -> list[Finding]:
    """torchvision and torchaudio import only beside the torch that they were built for."""
    if "torch" not in report.versions:
        return []
    findings, torch_version = [], report.versions["torch"]
    for name, needed_for in COMPANIONS.items():
        if name in report.versions:
            findings.append(Finding(name, "ok", report.versions[name]))
        else:
            error = report.errors.get(name, "it was not reached")
            found = f"does not import beside torch {torch_version}: {error}; only {needed_for} need it"
            findings.append(Finding(name, "note", found, install_beside(name, torch_version)))
    return findings


def gpus(report: TorchReport) -> list[Finding]:
    """A line for each GPU that torch can use, or why it can use none."""
    driver = driver_cuda()
    if report.gpus:
        return [_usable(number, gpu, driver) for number, gpu in enumerate(report.gpus)]
    if driver is None and report.cuda and report.gpu_error and "no NVIDIA driver" not in report.gpu_error:
        return [Finding("GPU", "note", f"cpu: {report.gpu_error}")]
    if driver is None:
        return [Finding("GPU", "ok", "cpu: no NVIDIA driver answers here")]
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return [Finding("GPU", "note", "cpu: CUDA_VISIBLE_DEVICES hides the GPUs", "unset it to use them")]
    if "torch" not in report.versions:
        return [Finding("GPU", "note", f"the driver offers CUDA {driver}; torch cannot say more")]
    return [_unusable(report, driver)]


def driver_cuda() -> str | None:
    """The newest CUDA that the driver can run, such as 12.8; None where neither nvidia-smi nor NVML has an answer."""
    if shutil.which("nvidia-smi"):
        shown = subprocess.run(
            ["nvidia-smi"], capture_output=True, encoding="utf-8", errors="replace", timeout=DRIVER_SECONDS
        )
        if found := re.search(r"CUDA[\w ]* Version: *(\d+\.\d+)", shown.stdout):
            return found[1]
    return _nvml_cuda()


def _nvml_cuda() -> str | None:
    try:
        import pynvml  # of the extra "gpu"
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    except pynvml.NVMLError:
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def _usable(number: int, gpu: dict[str, Any], driver: str | None) -> Finding:
    offered = f", driver for CUDA {driver}" if driver else ""
    found = f"{gpu['name']}, {size(gpu['free'])} of {size(gpu['total'])} free{offered}"
    if gpu["free"] < gpu["total"] / 2:
        return Finding(f"GPU {number}", "note", found, "others hold the rest: give --gpu-mem less than what is free")
    return Finding(f"GPU {number}", "ok", found)


def _unusable(report: TorchReport, driver: str) -> Finding:
    if report.cuda is None:
        found = f"the driver offers CUDA {driver}, but torch {report.versions['torch']} was built without CUDA"
        return Finding("GPU", "fix", found, "install a torch with CUDA, see pytorch.org; or give --device cpu")
    # Within a major version any driver runs what was built for any minor one.
    major = driver.partition(".")[0]
    if int(major) < int(report.cuda.partition(".")[0]):
        advice = f"update the driver, or install a torch that was built for CUDA {major}, see pytorch.org"
        return Finding("GPU", "fix", f"the driver offers CUDA {driver}, torch was built for {report.cuda}", advice)
    why = report.gpu_error.rstrip(".") or "it does not say why"
    return Finding("GPU", "fix", f"the driver offers CUDA {driver}, but torch finds no GPU: {why}", "see nvidia-smi")

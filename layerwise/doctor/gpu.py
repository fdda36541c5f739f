"""The GPUs: what the driver offers, against what torch was built for."""

import os
import re
import shutil
import subprocess

from layerwise.doctor.finding import Finding
from layerwise.doctor.torch_install import TorchReport
from layerwise.units import size

ANSWER_SECONDS = 30


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
        shown = subprocess.run(["nvidia-smi"], capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS)
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


def _usable(number: int, gpu: dict[str, object], driver: str | None) -> Finding:
    free, total = int(str(gpu["free"])), int(str(gpu["total"]))
    offered = f", driver for CUDA {driver}" if driver else ""
    found = f"{gpu['name']}, {size(free)} of {size(total)} free{offered}"
    if free < total / 2:
        return Finding(f"GPU {number}", "note", found, "others hold the rest: give --gpu-mem less than what is free")
    return Finding(f"GPU {number}", "ok", found)


def _unusable(report: TorchReport, driver: str) -> Finding:
    if report.cuda is None:
        found = f"the driver offers CUDA {driver}, but torch {report.versions['torch']} was built without CUDA"
        return Finding("GPU", "fix", found, "install a torch with CUDA, see pytorch.org; or give --device cpu")
    # Within a major version any driver runs what was built for any minor one.
    if int(driver.partition(".")[0]) < int(report.cuda.partition(".")[0]):
        advice = (
            f"update the driver, or install a torch that was built for CUDA {driver.partition('.')[0]}, see pytorch.org"
        )
        return Finding("GPU", "fix", f"the driver offers CUDA {driver}, torch was built for {report.cuda}", advice)
    why = report.gpu_error.rstrip(".") or "it does not say why"
    return Finding("GPU", "fix", f"the driver offers CUDA {driver}, but torch finds no GPU: {why}", "see nvidia-smi")

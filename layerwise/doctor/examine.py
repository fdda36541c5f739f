"""All checks, one after another; those of Python, HDF5, the compiled part of layerwise itself and extras stand here."""

import platform
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from layerwise.doctor import Finding
from layerwise.doctor.host import can_lock, containers, cores, disk_room, memory, slurm, write_speed
from layerwise.doctor.torch_checks import REINSTALL, TorchReport, ask_torch, companions, gpus, torch

TRIED = ((3, 11), (3, 13))
"""The oldest and the newest Python that layerwise was tried with."""

EXTRAS = {
    "gpu": ("pynvml",),
    "compression": ("zstandard", "hdf5plugin"),
    "parquet": ("pyarrow",),
    "timm": ("timm",),
    "transformers": ("transformers",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "dask": ("distributed",),
}
"""Each extra of setup.py that is for users, and the modules that it brings."""


def examine(cache_dir: Path) -> Iterator[Finding]:
    """Gives each finding as soon as it is there. cache_dir: where the caches are to lie; it need not exist."""
    yield from _tried("Python", python)
    try:
        report = ask_torch()
    except Exception as error:
        report = TorchReport(errors={"torch": f"could not be asked: {error}"})
    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("torch", lambda: torch(report)),
        ("torchvision, torchaudio", lambda: companions(report)),
        ("GPU", lambda: gpus(report)),
        ("HDF5", hdf5),
        ("cache reads", cache_reads),
        ("disk", lambda: disk_room(cache_dir)),
        ("disk speed", lambda: write_speed(cache_dir)),
        ("locks", lambda: can_lock(cache_dir)),
        ("memory", memory),
        ("cores", cores),
        ("Slurm", slurm),
        ("container", containers),
        ("extras", extras),
    ]
    for name, check in checks:
        yield from _tried(name, check)


def _tried(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """What the check finds. One that fails says so, and the others go on."""
    try:
        found = check()
    except Exception as error:  # whatever is odd about a machine, the doctor looks at the rest of it
        return [Finding(name, "note", f"could not be examined: {type(error).__name__}: {error}")]
    return found if isinstance(found, list) else [found]


def python() -> Finding:
    oldest, newest = (".".join(map(str, version)) for version in TRIED)
    if sys.version_info < TRIED[0]:
        return Finding("Python", "fix", platform.python_version(), f"layerwise needs Python {oldest} or newer")
    if sys.version_info[:2] > TRIED[1]:
        return Finding("Python", "note", f"{platform.python_version()}; tried are {oldest} to {newest}")
    return Finding("Python", "ok", platform.python_version())


def hdf5() -> Finding:
    try:
        import h5py
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("HDF5", "fix", f"h5py does not import: {error}", REINSTALL)
    return Finding("HDF5", "ok", f"{h5py.version.hdf5_version}, h5py {h5py.__version__}")


def cache_reads(folder: Path = Path(__file__).parents[1] / "cache") -> Finding:
    """Loads the file by itself, since the package around it would import torch."""
    slower = "by Python alone, which takes longer: the part in C"
    advice = f"install a C compiler and Python's headers (gcc, python3-dev); then, {REINSTALL}"
    file = next(folder.glob("compiled_reads*.so"), None)
    spec = spec_from_file_location("compiled_reads", file) if file else None
    if spec is None:
        return Finding("cache reads", "note", f"{slower} could not be built when layerwise was installed", advice)
    try:
        module_from_spec(spec)
    except ImportError as error:
        return Finding("cache reads", "note", f"{slower} does not load: {error}", advice)
    return Finding("cache reads", "ok", "compiled")


def extras() -> list[Finding]:
    return [
        Finding(f"extra {name}", "ok", ", ".join(modules))
        if all(map(find_spec, modules))
        else Finding(f"extra {name}", "note", f"not installed: pip install 'layerwise[{name}]'")
        for name, modules in EXTRAS.items()
    ]

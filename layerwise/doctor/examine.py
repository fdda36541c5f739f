"""All checks, one after another."""

from collections.abc import Callable, Iterator
from pathlib import Path

from layerwise.doctor import Finding
from layerwise.doctor.host import can_lock, containers, cores, disk_room, memory, slurm, write_speed
from layerwise.doctor.software import cache_reads, extras, hdf5, python
from layerwise.doctor.torch_checks import TorchReport, ask_torch, companions, gpus, torch


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

"""The machine around the GPU: memory, cores, batch system, container."""

import os
import shutil
from pathlib import Path

import psutil

from layerwise.doctor.finding import Finding
from layerwise.units import size

LITTLE = 4 * 10**9
"""Bytes of host memory with which the paper's networks still train."""

CGROUPS = Path("/sys/fs/cgroup")

CONTAINER_FILES = {"/.dockerenv": "Docker", "/run/.containerenv": "Podman"}
CONTAINER_VARIABLES = {
    "APPTAINER_CONTAINER": "Apptainer",
    "SINGULARITY_CONTAINER": "Singularity",
    "KUBERNETES_SERVICE_HOST": "Kubernetes",
}


def memory() -> Finding:
    machine = psutil.virtual_memory()
    limit = memory_limit(CGROUPS, _own_cgroup())
    limited = limit is not None and limit < machine.total
    total = limit if limited and limit else machine.total
    found = f"{size(total)}" + (
        f", which the container allows; the machine has {size(machine.total)}" if limited else ""
    )
    if total < LITTLE:
        return Finding("memory", "note", found, "give fewer --batch-size or a smaller network; see `layerwise plan`")
    return Finding("memory", "ok", found)


def memory_limit(cgroups: Path, own: str) -> int | None:
    """The least bytes that any of the control groups around this process allows; None where none of them says.

    cgroups: where they are mounted. own: the path of this process's group below it.
    """
    inside = cgroups / own.lstrip("/")
    files = [folder / "memory.max" for folder in (inside, *inside.parents)]  # version 2
    files += [cgroups / "memory" / "memory.limit_in_bytes"]  # version 1
    limits = [path.read_text().strip() for path in files if path.is_file()]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def _own_cgroup() -> str:
    """Of version 2, whose line begins with 0::; the root where there is none."""
    listing = Path("/proc/self/cgroup")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")


def cores() -> Finding:
    """Those that this process may use; a batch job is often given some of the machine's."""
    machine = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{usable}" + (f" of the machine's {machine}" if usable < machine else "")
    return Finding("cores", "ok", found + (f"; OMP_NUM_THREADS={threads}" if threads else ""))


def slurm() -> Finding:
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        return Finding("Slurm", "ok", f"inside job {job}")
    if shutil.which("sbatch"):
        return Finding("Slurm", "ok", "sbatch is there, for --engine slurm")
    return Finding("Slurm", "ok", "not here")


def containers() -> Finding:
    found = [name for path, name in CONTAINER_FILES.items() if Path(path).exists()]
    found += [name for variable, name in CONTAINER_VARIABLES.items() if variable in os.environ]
    return Finding("container", "ok", ", ".join(found) or "none")

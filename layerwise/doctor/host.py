"""The machine around the GPU: memory, cores, batch system, container, and the disk that the caches are to lie on.

What is written to that disk has no name, so that nothing stays behind, even of a kill.
"""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

from layerwise.doctor import Finding
from layerwise.errors import RunError
from layerwise.files import refuse_unwritable
from layerwise.units import size

LITTLE = 4 * 10**9
"""Bytes of host memory with which the paper's networks still train."""

WRITTEN = 256 * 10**6
"""Bytes of the trial."""

PIECE = 8 * 10**6

SLOW = 50e6
"""Bytes per second below which a cache takes longer to write than the passes that make it."""

LITTLE_ROOM = 10 * 10**9
"""Bytes below which few caches find room."""

CGROUPS = Path("/sys/fs/cgroup")

CONTAINER_FILES = {"/.dockerenv": "Docker", "/run/.containerenv": "Podman"}
CONTAINER_VARIABLES = {
    "APPTAINER_CONTAINER": "Apptainer",
    "SINGULARITY_CONTAINER": "Singularity",
    "KUBERNETES_SERVICE_HOST": "Kubernetes",
}


def memory() -> Finding:
    machine = psutil.virtual_memory().total
    total = min(machine, memory_limit(CGROUPS, _own_cgroup()) or machine)
    allowed = f", which the container allows; the machine has {size(machine)}" if total < machine else ""
    found = f"{size(total)}{allowed}"
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
    limits = [path.read_text(encoding="utf-8").strip() for path in files if path.is_file()]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def _own_cgroup() -> str:
    """Of version 2, whose line begins with 0::; the root where there is none."""
    listing = Path("/proc/self/cgroup")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")


def cores() -> Finding:
    """Those that this process may use; a batch job is often given some of the machine's."""
    machine = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{usable}" + (f" of the machine's {machine}" if usable < machine else "")
    return Finding("cores", "ok", found + (f"; OMP_NUM_THREADS={threads}" if threads else ""))


def slurm() -> Finding:
    job = os.environ.get("SLURM_JOB_ID")
    command = "sbatch is there, for --engine slurm" if shutil.which("sbatch") else "not here"
    return Finding("Slurm", "ok", f"inside job {job}" if job else command)


def containers() -> Finding:
    found = [name for path, name in CONTAINER_FILES.items() if Path(path).exists()]
    found += [name for variable, name in CONTAINER_VARIABLES.items() if variable in os.environ]
    return Finding("container", "ok", ", ".join(found) or "none")


def disk_room(cache_dir: Path) -> Finding:
    try:
        refuse_unwritable(cache_dir.expanduser())
    except RunError as error:
        return Finding("disk", "fix", str(error).partition(";")[0], "name another folder with --cache-dir")
    folder = nearest_folder(cache_dir)
    free = shutil.disk_usage(folder).free
    found = f"{size(free)} free for {cache_dir}"
    if free < LITTLE_ROOM:
        advice = "caches without room are recomputed; see `layerwise plan`, or name another disk with --cache-dir"
        return Finding("disk", "note", found, advice)
    return Finding("disk", "ok", found)


def write_speed(cache_dir: Path) -> Finding:
    """Of bytes that no file system can compress, synced."""
    folder = nearest_folder(cache_dir)
    if shutil.disk_usage(folder).free < 2 * WRITTEN:
        return Finding("disk speed", "note", f"not measured: there is no room for {size(WRITTEN)}")
    piece = os.urandom(PIECE)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            begun = time.perf_counter()
            for _ in range(WRITTEN // PIECE):
                file.write(piece)
            os.fsync(file.fileno())
            speed = WRITTEN / (time.perf_counter() - begun)
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror}"
        return Finding("disk speed", "fix", found, "mend that, or name another folder with --cache-dir")
    found = f"{size(round(speed))}/s written, with fsync, in {folder}"
    if speed < SLOW:
        return Finding("disk speed", "note", found, "caches take long; name a faster disk with --cache-dir")
    return Finding("disk speed", "ok", found)


def can_lock(cache_dir: Path) -> Finding:
    """Runs lock their folders with flock, which some network file systems lack."""
    folder = nearest_folder(cache_dir)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        advice = "use a file system that has locks: name another folder with --cache-dir"
        return Finding("locks", "fix", f"no file in {folder} can be locked: {error.strerror}", advice)
    return Finding("locks", "ok", f"files in {folder} can be locked")


def nearest_folder(place: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    here = place.expanduser()
    return next(folder for folder in (here, *here.parents) if folder.is_dir())

"""The disk that the caches are to lie on. What is written there has no name, so that nothing stays behind, even of a kill."""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from layerwise.doctor.finding import Finding
from layerwise.errors import RunError
from layerwise.files import refuse_unwritable
from layerwise.units import size

WRITTEN = 256 * 10**6
"""Bytes of the trial."""

PIECE = 8 * 10**6

SLOW = 50e6
"""Bytes per second below which a cache takes longer to write than the passes that make it."""

LITTLE = 10 * 10**9
"""Bytes below which few caches find room."""


def disk_room(cache_dir: Path) -> Finding:
    try:
        refuse_unwritable(cache_dir.expanduser())
    except RunError as error:
        return Finding("disk", "fix", str(error).partition(";")[0], "name another folder with --cache-dir")
    folder = nearest_folder(cache_dir)
    free = shutil.disk_usage(folder).free
    found = f"{size(free)} free for {cache_dir}"
    if free < LITTLE:
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

"""The files that a run writes, by their names: these alone are deleted, and never behind a link."""

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_CACHE_NAME = re.compile(r"stage-([1-9]\d*)\.h5(\.part|\.journal(?:-[1-9]\d*)?|\.packing|\.copying)?")


@dataclass(frozen=True, slots=True)
class CacheFile:
    """A file that a run has written into its folder of caches."""

    path: Path
    stage: int
    is_sealed: bool
    """By its name."""
    bytes: int
    """On this disk."""


def cache_files(folder: Path) -> list[CacheFile]:
    """All of them; files of other names are a user's own."""
    files = []
    for path in folder.glob("stage-*.h5*"):
        name = _CACHE_NAME.fullmatch(path.name)
        if name and (path.is_symlink() or not path.is_dir()):
            with contextlib.suppress(FileNotFoundError):  # gone by now
                files.append(CacheFile(path, int(name[1]), name[2] is None, path.lstat().st_blocks * 512))
    return files


STAGE_FILES = tuple(
    name + end
    for name in ("weights.safetensors", "checkpoint.safetensors", "metrics.jsonl", "memory.jsonl")
    for end in ("", ".tmp")
)
CURVES, CURVE_FILES = "tensorboard", ("events.out.tfevents.*",)
PLOT_FILES = tuple(
    name + end for name in ("losses", "memory", "caches", "errors-*", "confusion-*") for end in (".svg", ".png")
)
"""Patterns of the names that a run gives to its files."""


def delete_files(folder: Path, patterns: Iterable[str]) -> None:
    """Deletes the files of these names, and the folder where nothing else is in it. Links are not followed."""
    if folder.is_symlink():
        return
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        delete(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def delete_files_of_stage(folder: Path) -> None:
    if not folder.is_symlink():
        delete_files(folder / CURVES, CURVE_FILES)
    delete_files(folder, STAGE_FILES)


def delete(path: Path) -> None:
    """Deletes a file or a link. A folder of that name is not the run's, and stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)


def numbered(folder: Path) -> list[Path]:
    """The folders, and links, in it whose names are numbers."""
    children = sorted(folder.glob("*")) if folder.is_dir() and not folder.is_symlink() else []
    return [child for child in children if child.name.isdecimal()]

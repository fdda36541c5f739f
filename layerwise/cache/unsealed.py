"""Caches by their names: stage-S.h5, and the files that lie beside it until it is sealed."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"stage-([1-9]\d*)\.h5(\.part|\.journal(?:-[1-9]\d*)?|\.packing|\.copying)?")


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
        if name := _NAME.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # gone by now
                files.append(CacheFile(path, int(name[1]), name[2] is None, path.lstat().st_blocks * 512))
    return files


def unsealed(path: Path) -> tuple[Path, Path, Path]:
    """Of the cache NAME: its rows so far (NAME.part), what of them is durable (.journal), its compressed form (.packing)."""
    part, journal, packing = (path.with_name(path.name + ending) for ending in (".part", ".journal", ".packing"))
    return part, journal, packing


def copying(path: Path) -> Path:
    """A copy of the whole cache that is not there to its end yet."""
    return path.with_name(path.name + ".copying")


def journal_of(path: Path, first_block: int) -> Path:
    """The journal of the process that writes the blocks from this one on, where several share the file."""
    journal = unsealed(path)[1]
    return journal.with_name(f"{journal.name}-{first_block}") if first_block else journal


def journals(path: Path) -> list[Path]:
    """Those of all processes that have written the cache; the first need not be there."""
    journal = unsealed(path)[1]
    return [journal, *path.parent.glob(f"{journal.name}-*")]


def all_unsealed(path: Path) -> list[Path]:
    """Everything that may lie beside the cache until it is sealed."""
    part, _, packing = unsealed(path)
    return [part, *journals(path), packing, copying(path)]


def remove_unsealed(path: Path) -> None:
    """Deletes those that are there. Raises OSError."""
    for beside in all_unsealed(path):
        beside.unlink(missing_ok=True)

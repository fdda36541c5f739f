"""Caches by their names: stage-S.h5, and the files that lie beside it until it is sealed.

From the disk that a cache was written on to the one that others read it from: by copy and rename."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from layerwise.errors import CacheError
from layerwise.files import sync_folder, unwritable


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


def remove_unsealed(path: Path) -> None:
    """Deletes everything that may lie beside the cache until it is sealed. Raises OSError."""
    part, _, packing = unsealed(path)
    for beside in (part, *journals(path), packing, copying(path)):
        beside.unlink(missing_ok=True)


PIECE_BYTES = 8 * 2**20


def publish(written: Path, path: Path, poll: Callable[[], None]) -> None:
    """Moves a sealed cache to `path`, where it is whole or not at all; `poll` is called now and then and may raise.

    Raises CacheError where the folder or its disk does not take it; then, and after a kill, the written file is still there.
    """
    copy = copying(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written.open("rb") as source, copy.open("wb") as target:
            while piece := source.read(PIECE_BYTES):
                target.write(piece)
                poll()
            target.flush()
            os.fsync(target.fileno())
        os.replace(copy, path)
        sync_folder(path.parent)
        written.unlink()
    except OSError as error:
        with suppress(OSError):
            copy.unlink(missing_ok=True)
        raise CacheError(unwritable(copy, error)) from None

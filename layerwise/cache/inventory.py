"""Caches by their names, and in what state they are: stage-S.h5, and the files that lie beside it until it is sealed."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from layerwise.cache.layout import Layout
from layerwise.cache.reader import ActivationCache
from layerwise.errors import CacheError, DamagedCache
from layerwise.files import errors_of_writing, open_new, open_own, sync_folder

UNSEALED = {
    ".part": "not written to its end",
    ".packing": "not packed to its end",
    ".copying": "not copied to its end",
}
"""Ending of a cache that is not sealed, to its state; whether a run is at it or was killed, the file cannot tell."""

PIECE_BYTES = 8 * 2**20
"""Copied at once."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One cache file."""

    path: Path
    bytes: int
    """On the disk."""
    layout: Layout | None
    """None where it is not sealed, or damaged."""
    state: str
    """sealed, not written to its end, not packed to its end, not copied to its end, damaged, or unusable."""
    finding: str | None = None
    """What is wrong with it, and what to do, where it is damaged or unusable."""


def find_caches(place: Path) -> list[Path]:
    """Cache files, sealed or not: the file itself, or all in the folder and in the folders in it, in order of their names.

    Raises CacheError where there is nothing of that name.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise CacheError(f"{place} does not exist; name a run directory, a folder of caches or a cache file.")
    names = ["stage-*.h5", *(f"stage-*.h5{ending}" for ending in UNSEALED)]
    found = [path for name in names for path in (*place.glob(name), *place.glob(f"*/{name}"))]
    return sorted(found, key=lambda path: (path.parent, len(path.stem), path.name))


def entries(paths: Mapping[Path, str | None]) -> Iterator[Entry]:
    """What each file is; activations are not read. paths: to the fingerprint that a run has recorded, if one has."""
    for path, fingerprint in paths.items():
        try:
            size = path.stat().st_blocks * 512
        except OSError as error:  # a link to nowhere, or a file that is gone by now
            yield Entry(path, 0, None, "unusable", f"{path} cannot be read: {error.strerror}.")
            continue
        if path.suffix in UNSEALED:
            yield Entry(path, size, None, UNSEALED[path.suffix])
            continue
        try:
            with ActivationCache(path, fingerprint) as cache:
                yield Entry(path, size, cache.layout, "sealed")
        except CacheError as error:
            yield Entry(path, size, None, "damaged" if isinstance(error, DamagedCache) else "unusable", str(error))


def beside(path: Path, ending: str) -> Path:
    """A file beside the cache until it is sealed.

    .part holds its rows so far, .packing its compressed form and .copying a copy of the whole, neither there to its end yet.
    """
    return path.with_name(path.name + ending)


def journal_of(path: Path, first_block: int) -> Path:
    """The journal of the process that writes the blocks from this one on, where several share the file."""
    return beside(path, f".journal-{first_block}" if first_block else ".journal")


def journals(path: Path) -> list[Path]:
    """Those of all processes that have written the cache; the first need not be there."""
    journal = journal_of(path, 0)
    return [journal, *path.parent.glob(f"{journal.name}-*")]


def remove_unsealed(path: Path) -> None:
    """Deletes what lies beside the cache until it is sealed. Raises OSError."""
    for file in (beside(path, ".part"), *journals(path), beside(path, ".packing"), beside(path, ".copying")):
        file.unlink(missing_ok=True)


def publish(written: Path, path: Path, poll: Callable[[], None]) -> None:
    """Moves a sealed cache to `path`, where it is whole or not at all; `poll` is called now and then and may raise.

    Raises CacheError where the folder or its disk does not take it; then, and after a kill, the written file is still there.
    """
    copy = beside(path, ".copying")
    busy = CacheError(f"Another process is writing {path}; wait for it.")
    with errors_of_writing(copy, CacheError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_own(written) as source, open_new(copy, busy) as target:
                while piece := source.read(PIECE_BYTES):
                    target.write(piece)
                    poll()
                target.flush()
                os.fsync(target.fileno())
            os.replace(copy, path)
            sync_folder(path.parent)
            written.unlink()
        except OSError:
            with suppress(OSError):
                copy.unlink(missing_ok=True)
            raise

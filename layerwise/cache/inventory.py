"""Which caches lie in a folder, and in what state."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from layerwise.cache.layout import Layout
from layerwise.cache.reader import ActivationCache
from layerwise.errors import CacheError, DamagedCache


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


UNSEALED = {
    ".part": "not written to its end",
    ".packing": "not packed to its end",
    ".copying": "not copied to its end",
}
"""Ending of a cache that is not sealed, to its state; whether a run is at it or was killed, the file cannot tell."""


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


def entries(paths: list[Path]) -> Iterator[Entry]:
    """What each file is; activations are not read."""
    for path in paths:
        try:
            size = path.stat().st_blocks * 512
        except OSError as error:  # a link to nowhere, or a file that is gone by now
            yield Entry(path, 0, None, "unusable", f"{path} cannot be read: {error.strerror}.")
            continue
        if path.suffix in UNSEALED:
            yield Entry(path, size, None, UNSEALED[path.suffix])
            continue
        try:
            with ActivationCache(path) as cache:
                yield Entry(path, size, cache.layout, "sealed")
        except CacheError as error:
            yield Entry(path, size, None, "damaged" if isinstance(error, DamagedCache) else "unusable", str(error))

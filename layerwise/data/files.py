"""The files of a data set below a folder: found, tried one by one, and named where they cannot be used."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from layerwise.data.source import Skipped
from layerwise.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UsableFiles(Generic[T]):
    """Files that can be read, and those that were left out."""

    folder: Path
    ids: list[str]
    """Sorted paths below the folder, with / between their parts."""
    details: list[T]
    """What inspection found out about each."""
    skipped: list[Skipped]


@dataclass(frozen=True, slots=True)
class Extensions:
    """Endings of the files that are looked at, in small letters and with the dot."""

    read: set[str]
    not_read: set[str]
    """Of the same kind in other formats: they are named."""
    instead: str
    """Formats that they can be converted to."""


def usable_files(
    place: Path, extensions: Extensions, what: str, inspect: Callable[[Path], T | str], fewest: int = 2
) -> UsableFiles[T]:
    """The files with these endings below a folder; or the one file, where fewer than two are enough.

    inspect: gives what there is to know about a file, or the reason why it cannot be used. what: names the files in errors.
    Raises DataError where the folder is missing or holds none, or fewer than `fewest` can be used.
    """
    single = place.is_file() and fewest < 2
    folder = place.parent if single else place
    names, skipped = ([place.name], []) if single else _list_files(place, extensions, what)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda name: inspect(folder / name), names))
    usable = [(name, found) for name, found in zip(names, results, strict=True) if not isinstance(found, str)]
    skipped += [Skipped(name, found) for name, found in zip(names, results, strict=True) if isinstance(found, str)]
    if len(usable) < fewest:
        first = f"; the first: {skipped[0].path}, {skipped[0].reason}" if skipped else ""
        raise DataError(
            f"{place} holds {len(usable)} usable {what} and {len(skipped)} unusable ones{first}. "
            "That is too few to train on."
        )
    return UsableFiles(folder, [name for name, _ in usable], [found for _, found in usable], skipped)


def _list_files(folder: Path, extensions: Extensions, what: str) -> tuple[list[str], list[Skipped]]:
    """Sorted names of files with these endings, and what cannot even be tried. Names that start with a dot are ignored."""
    if not folder.exists():
        raise DataError(f"The data folder {folder} does not exist; name the one that holds the {what}.")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the one that holds the {what}.")
    found: list[str] = []
    skipped: list[Skipped] = []
    for parent, files in _folders(folder, skipped):
        for path in (parent / name for name in files):
            ending, known = path.suffix.lower(), extensions.read | extensions.not_read
            leads_nowhere = path.is_symlink() and not path.exists()  # it may have been a folder with any name
            if path.name.startswith(".") or not (ending in known or leads_nowhere):
                continue
            name = path.relative_to(folder).as_posix()
            as_utf8 = _as_utf8(name)
            if name != as_utf8:
                skipped.append(Skipped(as_utf8, "its name is not valid UTF-8"))
            elif leads_nowhere:
                skipped.append(Skipped(name, "a link to what is not there"))
            elif ending in extensions.not_read:
                skipped.append(Skipped(name, f"{ending[1:].upper()} is not read; convert it to {extensions.instead}"))
            elif not path.is_file():  # a pipe would block for ever
                skipped.append(Skipped(name, "not a regular file"))
            else:
                found.append(name)
    if not found and not skipped:
        raise DataError(f"{folder} holds no {what} ({', '.join(sorted(extensions.read))}); name the folder that does.")
    return sorted(found), skipped


def _folders(top: Path, skipped: list[Skipped]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder below, with the names of its files. What cannot be entered is added to `skipped`.

    Links to folders are followed when all that lies here itself is known, and each folder is entered once: a link may lead
    back to where it lies.
    """
    entered: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:
        start, unreadable = waiting.pop(0), list[OSError]()
        if start.is_symlink() and start != top and _number(start) in entered:
            skipped.append(
                Skipped(_as_utf8(start.relative_to(top).as_posix()), "a link to a folder that is read already")
            )
            continue
        for parent, folders, files in os.walk(start, onerror=unreadable.append):
            number = _number(Path(parent))
            if number in entered:
                folders.clear()
                continue
            entered.add(number)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [link for link in (Path(parent, name) for name in folders) if link.is_symlink()]
            yield Path(parent), files
        skipped += [Skipped(str(error.filename), error.strerror or "folder cannot be read") for error in unreadable]


def _number(folder: Path) -> tuple[int, int]:
    """What tells a folder from all others, by whatever name it is called."""
    about = folder.stat()
    return about.st_dev, about.st_ino


def _as_utf8(name: str) -> str:
    """In the letters in which names are stored in caches and reports."""
    return os.fsencode(name).decode(errors="replace")

"""Finds the files of a data set below a folder, and names those that cannot even be tried."""

import os
from pathlib import Path

from layerwise.data.source import Skipped
from layerwise.errors import DataError


def list_files(folder: Path, extensions: set[str], what: str) -> tuple[list[str], list[Skipped]]:
    """Sorted paths below the folder, with / between their parts, of files with these endings; and what is skipped.

    Names that start with a dot are ignored, linked folders are not entered. `what` names the files in errors.
    Raises DataError where the folder is missing or holds none.
    """
    if not folder.exists():
        raise DataError(f"The data folder {folder} does not exist; name the one that holds the {what}.")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the one that holds the {what}.")
    found: list[str] = []
    skipped: list[Skipped] = []
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in files):
            if path.suffix.lower() not in extensions or path.name.startswith("."):
                continue
            name = path.relative_to(folder).as_posix()
            if not _is_utf8(name):
                skipped.append(Skipped(os.fsencode(name).decode(errors="replace"), "its name is not valid UTF-8"))
            elif not path.is_file():  # a broken link, or a pipe that would block for ever
                skipped.append(Skipped(name, "not a regular file"))
            else:
                found.append(name)
    skipped += [Skipped(str(error.filename), error.strerror or "folder cannot be read") for error in unreadable]
    if not found and not skipped:
        raise DataError(f"{folder} holds no {what} ({', '.join(sorted(extensions))}); name the folder that does.")
    return sorted(found), skipped


def _is_utf8(name: str) -> bool:
    """Names are stored as UTF-8 in caches and reports; others cannot be written there."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True

"""From the disk that a cache was written on to the one that others read it from: by copy and rename."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from layerwise.cache.unsealed import copying
from layerwise.errors import CacheError
from layerwise.files import sync_folder, unwritable

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

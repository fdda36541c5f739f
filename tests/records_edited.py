"""Changes what a record says, digest and all, as somebody would who means harm or tests a case."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerwise.records import write_record


@contextmanager
def edited(path: Path) -> Iterator[dict[str, Any]]:
    """The record as plain values, to be changed inside the block."""
    tree = json.loads(path.read_text())
    del tree["digest"]
    yield tree
    write_record(path, tree)

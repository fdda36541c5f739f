"""Records on the disk: JSON that is read through a strict model, and holds what was written.

A record carries a digest of all else that it says, so a flipped bit never passes for another value.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from layerwise.errors import RunError
from layerwise.files import read_bytes, write_atomically

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""Of a dataclass that is read from a record, as its `__pydantic_config__`."""

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

T = TypeVar("T")


def write_record(path: Path, record: object, **also: Any) -> None:
    """Replaces the file by a dataclass, or a dict, as indented JSON, atomically. also: more for other programs.

    Raises RunError.
    """
    tree = _adapter(cast(Any, type(record))).dump_python(record, mode="json") | also
    try:
        content = json.dumps(tree | {"digest": _digest(tree)}, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RunError(f"{path} cannot be written: {error.object!a:.80} is no text in UTF-8; rename it.") from None
    write_atomically(path, content + b"\n")


def read_record(
    kind: type[T], path: Path, version: int | None = None, way_out: str = "restore it, or move it away."
) -> T:
    """What `write_record` wrote. version: that the record must be of, where it names one.

    Raises RunError where it is missing, of another version, or damaged.
    """
    try:
        content = read_bytes(path)
        tree = json.loads(content)
        if version is not None and tree["version"] != version:
            raise RunError(
                f"{path} is of version {tree['version']!r:.20}; this layerwise reads version {version}. Go on with the "
                "layerwise that began it, or start anew in another folder."
            )
        if tree.pop("digest") != _digest(tree):
            raise ValueError("it does not hold what was written")
        read: T = _adapter(cast(Any, kind)).validate_json(json.dumps(tree))
        return read
    except FileNotFoundError:
        raise RunError(f"{path} is missing; restore it.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {finding(error)}; {way_out}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def finding(error: Exception) -> str:
    """What is wrong, in words; of a model's errors the first, with the place that it is about."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return "it nests too deep" if isinstance(error, RecursionError) else str(error) or type(error).__name__

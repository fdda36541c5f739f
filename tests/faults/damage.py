"""Ways in which a file of a run can be damaged, exchanged or laid as a trap."""

import copy
import io
import json
import os
import shutil
import struct
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tomli_w

FOREIGN_CODE = "foreign_code:make"
"""A function that leaves a mark when its module is imported, as a config names a network or data."""

CONTROL = "\x1b[31m\x07"
"""What would colour a terminal, and ring."""

DEEP = 100_000
HUGE_FILE = 2**34


@dataclass(frozen=True, slots=True)
class Damage:
    """What is done to a file of a run."""

    kind: str
    """Row of the table that is printed in the end."""
    detail: str
    """Which one of its kind."""
    do: Callable[[Path], object]
    """Does it to the file, which is a copy."""
    content: bytes | None = None
    """What the file holds then, where that is all that is done."""


def damages_of_file(path: Path, others: dict[str, Path], outside: Path, decoy: Path) -> Iterator[Damage]:
    """All of them for one file.

    others: files that it may be exchanged with, by what they are; outside: a file elsewhere with the same content; decoy: a
    folder of caches that looks like the run's own, to be named in place of its own.
    """
    yield from damaged_bytes(path.read_bytes())
    yield from exchanged(others)
    yield from traps(outside)
    yield from changed_records(path, decoy)


def damaged_bytes(whole: bytes) -> Iterator[Damage]:
    places = {
        "byte 0": 0,
        "byte 12": 12,
        "a quarter in": len(whole) // 4,
        "middle": len(whole) // 2,
        "end": len(whole) - 1,
    }
    for name, place in places.items():
        if 0 <= place < len(whole):
            flipped = bytearray(whole)
            flipped[place] ^= 1
            yield _bytes("bit flipped", name, bytes(flipped))
    yield _bytes("cut short", "half", whole[: len(whole) // 2])
    yield _bytes("cut short", "last byte", whole[:-1])
    yield _bytes("emptied", "", b"")
    yield _bytes("other bytes", "zeros", bytes(len(whole)))
    yield _bytes("other bytes", "no UTF-8", b"\xff\xfe" + whole)
    yield _bytes("other bytes", "twice", whole + whole)


def exchanged(others: dict[str, Path]) -> Iterator[Damage]:
    for name, other in others.items():
        yield _bytes("exchanged", name, other.read_bytes())


def traps(outside: Path) -> Iterator[Damage]:
    """What is no plain file at all, or no sane one."""
    yield Damage("missing", "", remove)
    yield Damage("huge file", "grown", lambda path: os.truncate(path, HUGE_FILE))
    yield Damage("huge file", "hole", _hole)
    yield Damage("FIFO", "", lambda path: (remove(path), os.mkfifo(path)))
    yield Damage("directory", "", lambda path: (remove(path), path.mkdir()))
    yield from links(outside)


def links(outside: Path) -> Iterator[Damage]:
    yield Damage("link", "outside", lambda path: (remove(path), path.symlink_to(outside)))
    yield Damage("link", "dangling", lambda path: (remove(path), path.symlink_to(outside.with_name("absent"))))
    yield Damage("link", "to itself", lambda path: (remove(path), path.symlink_to(path.name)))


def damages_of_folder(outside: Path) -> Iterator[Damage]:
    """outside: a folder elsewhere with the same content."""
    yield Damage("missing", "", remove)
    yield Damage("emptied", "", lambda path: (remove(path), path.mkdir()))
    yield Damage("FIFO", "", lambda path: (remove(path), os.mkfifo(path)))
    yield Damage("file for a folder", "", lambda path: (remove(path), path.write_bytes(b"")))
    yield from links(outside)


def changed_records(path: Path, decoy: Path) -> Iterator[Damage]:
    """Wrong types and values, huge numbers and depth in what the file says in JSON, TOML, or as metadata of arrays."""
    if path.suffix == ".json":
        yield from _changed_text(json.loads(path.read_text()), _json, decoy)
        yield from _odd_json()
    elif path.suffix == ".toml":
        yield from _changed_text(tomllib.loads(path.read_text()), _toml, decoy)
        yield from _odd_toml()
    elif path.suffix == ".jsonl":
        first, *rest = path.read_bytes().splitlines(keepends=True)
        yield from _changed_text(json.loads(first), lambda tree: _json(tree) + b"\n" + b"".join(rest), decoy)
        yield from _odd_json()
    elif path.suffix == ".safetensors":
        yield from _changed_safetensors(path.read_bytes(), decoy)
    elif path.suffix == ".h5":
        yield from _changed_hdf5(path, decoy)


def _json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _toml(tree: Any) -> bytes:
    if not isinstance(tree, dict):
        raise TypeError("TOML is a table")
    return tomli_w.dumps(tree).encode()


def _changed_text(tree: Any, encode: Callable[[Any], bytes], decoy: Path) -> Iterator[Damage]:
    for kind, detail, changed in changed_values(tree, decoy):
        try:
            yield _bytes(kind, detail, encode(changed))
        except (TypeError, ValueError):  # TOML cannot say null
            continue


def changed_values(tree: Any, decoy: Path) -> Iterator[tuple[str, str, Any]]:
    """Kind, description and a tree that differs in one place; of lists the first element stands for all."""
    for place in _places(tree):
        value = _at(tree, place)
        said = ".".join(map(str, place))
        for kind, other in _other_values(value):
            yield kind, f"{said} = {_short(other)}", _with(tree, place, other)
        for kind, other in _foreign_values(place[-1], value, decoy):
            yield kind, said, _with(tree, place, other)
        yield "wrong value", f"without {said}", _without(tree, place)
    for kind, other in (("wrong type", []), ("wrong type", 5), ("wrong type", "text"), ("wrong type", None)):
        yield kind, f"all is {other!r}", other


def _places(tree: Any, before: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    entries = tree.items() if isinstance(tree, dict) else list(enumerate(tree))[:1] if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*before, key)
        yield from _places(value, (*before, key))


def _foreign_values(key: str | int, value: Any, decoy: Path) -> Iterator[tuple[str, str]]:
    """A folder that is not the run's where a place is named, a function of somebody else where one may be."""
    if isinstance(value, str) and ("/" in value or key in ("cache", "caches", "dir", "out")):
        yield "foreign path", str(decoy)
    if isinstance(value, str) and key in ("name", "network", "source"):
        yield "foreign code", FOREIGN_CODE


def _other_values(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool) or value is None:
        yield from (("wrong type", "x"), ("wrong type", [1]))
    elif isinstance(value, int):
        yield from (("wrong type", "x"), ("wrong type", 0.5), ("wrong value", -1), ("wrong value", value + 1))
        yield from (("huge number", 10**30), ("huge number", 2**31))
    elif isinstance(value, float):
        yield from (("wrong type", "x"), ("wrong value", -1.0), ("wrong value", float("nan")), ("huge number", 1e308))
    elif isinstance(value, str):
        yield from (("wrong type", 5), ("wrong value", ""), ("wrong value", CONTROL + value[1:]))
        yield "huge number", "x" * 10**5
        if value:
            yield "wrong value", chr(ord(value[0]) ^ 1) + value[1:]
    elif isinstance(value, list):
        yield from (("wrong type", {}), ("wrong value", []), ("wrong type", _nested(100)))
        yield "huge number", (value[:1] or [1]) * 20_000
    else:
        yield from (("wrong type", []), ("wrong value", {}), ("wrong type", _nested(100)))


def _nested(depth: int) -> list:
    tree: list = []
    for _ in range(depth):
        tree = [tree]
    return tree


def _at(tree: Any, place: tuple[str | int, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _with(tree: Any, place: tuple[str | int, ...], value: Any) -> Any:
    changed = copy.deepcopy(tree)
    _at(changed, place[:-1])[place[-1]] = value
    return changed


def _without(tree: Any, place: tuple[str | int, ...]) -> Any:
    changed = copy.deepcopy(tree)
    del _at(changed, place[:-1])[place[-1]]
    return changed


def _short(value: Any) -> str:
    """Without what differs from world to world, so that a case has one name for ever."""
    said = ascii(value)
    if len(said) < 12:
        return said
    if isinstance(value, str):
        letters = "odd" if value.startswith(CONTROL) else value[0] if len(value) > 999 else "other"
        return f"{len(value)} letters: {letters}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, bytes | list | dict) else said


def _odd_json() -> Iterator[Damage]:
    yield _bytes("nested", "JSON lists", b"[" * DEEP + b"]" * DEEP)
    yield _bytes("nested", "JSON objects", b'{"a":' * DEEP + b"1" + b"}" * DEEP)
    yield _bytes("huge number", "JSON digits", b'{"version": ' + b"1" * 10_000 + b"}")
    yield _bytes("other bytes", "a surrogate", b'{"version": "\\ud800"}')


def _odd_toml() -> Iterator[Damage]:
    yield _bytes("nested", "TOML lists", b"a = " + b"[" * DEEP + b"]" * DEEP)
    yield _bytes("nested", "TOML tables", b"[" + b".".join([b"a"] * DEEP) + b"]\n")
    yield _bytes("huge number", "TOML digits", b"[training]\nseed = " + b"1" * 10_000)
    yield _bytes("huge number", "TOML float", b"[training]\nlr = 1e999\n")
    yield _bytes("wrong type", "TOML date", b"[training]\nlr = 1979-05-27\n")


def _changed_safetensors(whole: bytes, decoy: Path) -> Iterator[Damage]:
    """Of the length of the header, the header, and what the metadata in it say in JSON and TOML."""
    (length,) = struct.unpack("<Q", whole[:8])
    arrays = whole[8 + length :]
    tree = json.loads(whole[8 : 8 + length])

    def encode(changed: Any) -> bytes:
        header = _json(changed)
        return struct.pack("<Q", len(header)) + header + arrays

    for other in (0, 2**62, 2**63 + 1, len(whole), length - 1):
        yield _bytes("huge number", f"header of {other} bytes", struct.pack("<Q", other) + whole[8:])
    for depth in (500, DEEP):
        header = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        yield _bytes("nested", f"header, {depth} deep", struct.pack("<Q", len(header)) + header + arrays)
    metadata = tree.get("__metadata__", {})
    names = [name for name in tree if name != "__metadata__"]
    for name in names[:1]:
        for kind, detail, changed in changed_values(tree[name], decoy):
            yield _bytes(kind, f"{name}: {detail}", encode(tree | {name: changed}))
        for dtype in ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64"):
            yield _bytes("wrong type", f"{name}: {dtype}", encode(tree | {name: tree[name] | {"dtype": dtype}}))
        for shape in ([2**40], [0], [1] * 1000, [2**62, 4]):
            changed = tree[name] | {"shape": shape}
            yield _bytes("huge number", f"{name}: shape {_short(shape)}", encode(tree | {name: changed}))
        yield _bytes("wrong value", f"without {name}", encode({key: tree[key] for key in tree if key != name}))
    yield _bytes("wrong value", "without metadata", encode({name: tree[name] for name in names}))
    for key, text in metadata.items():
        for other in ("", "x", "[" * DEEP, "9" * 10_000, "x" * 10**5):
            changed = metadata | {key: other}
            yield _bytes("wrong value", f"metadata {key} = {_short(other)}", encode(tree | {"__metadata__": changed}))
        for described in _changed_text(*_parsed(text), decoy):
            assert described.content is not None
            changed = metadata | {key: described.content.decode()}
            detail = f"metadata {key}: {described.detail}"
            yield _bytes(described.kind, detail, encode(tree | {"__metadata__": changed}))


def _parsed(text: str) -> tuple[Any, Callable[[Any], bytes]]:
    """A record in the metadata, and how it is written; an empty one where it is plain text."""
    for parse, encode in ((json.loads, _json), (tomllib.loads, _toml)):
        try:
            tree = parse(text)
        except ValueError:
            continue
        if isinstance(tree, dict):
            return tree, encode
    return {}, _json


def _changed_hdf5(path: Path, decoy: Path) -> Iterator[Damage]:
    """Of the attributes and data sets of a cache."""
    with h5py.File(path) as file:
        attributes, datasets = list(file.attrs), [name for name, each in file.items() if isinstance(each, h5py.Dataset)]
        kinds = {name: file.attrs[name] for name in attributes}
    for name, value in kinds.items():
        is_text = isinstance(value, bytes | str)
        others: list[tuple[str, Any]] = [
            ("wrong type", 5 if is_text else "x"),
            ("wrong type", np.zeros(3)),
            ("huge number", b"x" * 60_000 if is_text else 2**62),
            ("wrong value", b"other" if is_text else -1),
            ("wrong value", b"" if is_text else 0),
            ("wrong value", None),
        ]
        for kind, other in others:
            yield _hdf5(path, kind, f"attribute {name} = {_short(other)}", partial(_set_attribute, name, other))
    for name in datasets:
        yield _hdf5(path, "wrong value", f"without {name}", partial(_replace, name, None))
        yield _hdf5(path, "wrong type", f"{name} is a group", partial(_to_group, name))
        yield _hdf5(path, "huge number", f"{name} of 2^40 rows", partial(_replace, name, 2**40))
        yield _hdf5(path, "wrong type", f"{name} of text", partial(_retype, name))
        yield _hdf5(path, "link", f"{name} in a file outside", partial(_external, name, decoy / "stage-1.h5"))
        yield _hdf5(path, "link", f"{name} is a link to itself", partial(_to_itself, name))


def _hdf5(path: Path, kind: str, detail: str, change: Callable[[h5py.File], object]) -> Damage:
    memory = io.BytesIO(path.read_bytes())
    with h5py.File(memory, "r+") as file:
        change(file)
    return _bytes(kind, detail, memory.getvalue())


def _set_attribute(name: str, value: Any, file: h5py.File) -> None:
    del file.attrs[name]
    if value is not None:
        file.attrs[name] = value


def _to_group(name: str, file: h5py.File) -> None:
    del file[name]
    file.create_group(name)


def _replace(name: str, rows: int | None, file: h5py.File) -> None:
    old = file[name]
    shape, dtype = old.shape, old.dtype
    del file[name]
    if rows is not None:
        rest = tuple(max(size, 1) for size in shape[1:])
        file.create_dataset(name, (rows, *rest), dtype, chunks=(1024, *rest))


def _retype(name: str, file: h5py.File) -> None:
    shape = file[name].shape
    del file[name]
    file.create_dataset(name, data=np.full(shape, b"text"))


def _external(name: str, other: Path, file: h5py.File) -> None:
    del file[name]
    file[name] = h5py.ExternalLink(str(other), name)


def _to_itself(name: str, file: h5py.File) -> None:
    del file[name]
    file[name] = h5py.SoftLink(f"/{name}")


def _bytes(kind: str, detail: str, content: bytes) -> Damage:
    return Damage(kind, detail, partial(_write, content), content)


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _hole(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, HUGE_FILE)


def remove(path: Path) -> None:
    """A file, a link or a folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

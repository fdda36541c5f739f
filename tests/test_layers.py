"""Imports point one way: a room uses only the rooms below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "layerwise"

LEAVES = {
    *("errors", "version", "config", "events", "files", "forecast"),
    *("importing", "records", "run_store", "screen", "stop", "units"),
}
ROOMS = {
    "cache": {"errors", "files"},
    "data": {"errors", "config", "files", "importing"},
    "nets": {"errors", "config", "importing"},
    "objectives": {"errors", "config"},
    "memory": {"errors", "config"},
    "training": LEAVES | {"cache", "data", "nets", "objectives", "memory"},
    "evaluate": LEAVES | {"engines", "training", "cache", "data", "nets", "memory"},
    "tracking": LEAVES,
    "engines": LEAVES | {"training", "tracking", "data", "nets", "memory", "cache"},
    "encoder": LEAVES | {"training", "cache", "data", "nets", "memory"},
    "doctor": {"errors", "files", "importing", "units"},
    "report": LEAVES | {"evaluate"},
    "commands": LEAVES | {"training", "engines", "evaluate", "encoder", "report", "cache", "doctor"},
}
"""Room to what it may import, besides itself."""
FILES = {"tracking"}
"""Rooms that are a single file."""


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("layerwise.")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_below(room: str) -> None:
    for path in (*PACKAGE.glob(f"{room}.py"), *PACKAGE.glob(f"{room}/*.py")):
        assert imported_rooms(path) <= ROOMS[room] | {room}, path.name


def test_leaves_import_only_leaves() -> None:
    for name in LEAVES:
        for path in (*PACKAGE.glob(f"{name}.py"), *PACKAGE.glob(f"{name}/*.py")):
            assert imported_rooms(path) <= {name, "errors", "config", "files", "recipes", "records", "units"}, path


def test_every_room_has_a_rule() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert rooms - {"recipes"} - LEAVES == set(ROOMS) - FILES


def test_only_the_command_line_knows_click() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "commands":
            assert "import click" not in path.read_text(), path

"""Every message that a page quotes is one that layerwise says."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VALUE = "…"
"""Stands for a name or a number, in the pages and in what is read from the source."""


def quoted() -> Iterator[tuple[str, str]]:
    """(page, message) of the first column of each table of messages."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        of_messages = False
        for line in page.read_text().splitlines():
            if line.startswith(("| message |", "| what you see |")):
                of_messages = True
            elif not line.startswith("|"):
                of_messages = False
            elif of_messages and (message := re.match(r"\| `([^`]+)`", line)):
                yield page.name, message.group(1)


@cache
def said() -> tuple[str, ...]:
    """Every text of the source, values in it replaced."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "layerwise").rglob("*.py"))
    return tuple(text for tree in trees for node in ast.walk(tree) if (text := text_of(node)))


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or VALUE for part in node.values)
    return ""


def pattern(message: str) -> re.Pattern[str]:
    """A value of the page may be a value of the source, or be written out there."""
    return re.compile(".*".join(re.escape(part) for part in message.split(VALUE)), re.DOTALL)


@pytest.mark.parametrize(("page", "message"), list(quoted()))
def test_a_quoted_message_is_said(page: str, message: str) -> None:
    assert any(pattern(message).search(text) for text in said()), f"{page}: layerwise never says {message!r}"


def test_tables_of_messages_are_found() -> None:
    found = list(quoted())
    assert len(found) > 25
    assert {page for page, _ in found} >= {"troubleshooting.md", "clusters.md"}
    assert not any(pattern("The GPU is on fire").search(text) for text in said())

"""Text files are UTF-8 whatever the locale: nothing in the package leaves the encoding to it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "layerwise"
TEXT = {"read_text", "write_text", "open"}
"""Names of functions that open text, unless a mode says otherwise."""
NOT_TEXT = {"os", "Image", "archive", "h5a", "h5d", "wave"}
"""What has an `open` of its own."""


def leaves_the_encoding_to_the_locale(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func).split(".")[-2:-1]
    modes = [value.value for value in call.args if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    given = {keyword.arg for keyword in call.keywords}
    if "text" in given or "universal_newlines" in given:
        return True
    if isinstance(call.func, ast.Name) and name != "open":  # layerwise.files.read_text
        return False
    return name in TEXT and not (set(owner) & NOT_TEXT or any("b" in mode for mode in modes) or "encoding" in given)


@pytest.mark.parametrize("room", sorted({path.parent for path in PACKAGE.rglob("*.py")}), ids=lambda room: room.name)
def test_every_text_file_and_pipe_names_its_encoding(room: Path) -> None:
    for path in room.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and leaves_the_encoding_to_the_locale(node):
                pytest.fail(f"{path}:{node.lineno}: {ast.unparse(node)}")

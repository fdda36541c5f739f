"""docs/layout.md names the folders that there are, and nothing that there is not."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "layout.md").read_text()
PAGES = {
    path: path.read_text() for path in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
}


def test_every_folder_of_the_package_has_a_row() -> None:
    rows = re.findall(r"^\| `layerwise/(\w+)/` \|", PAGE, re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "layerwise").glob("*/__init__.py")}
    assert len(rows) == len(set(rows))
    assert set(rows) == folders


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_path_in_a_page_exists(page: Path) -> None:
    named = re.findall(r"`((?:layerwise|tests|benchmarks|docs)/[\w./]*)`", PAGES[page])
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_name_of_the_recipes_for_additions_is_in_the_code() -> None:
    """`_BUILD`, `build_network` and the like, which the page tells people to look for."""
    source = "\n".join(path.read_text() for path in (ROOT / "layerwise").rglob("*.py"))
    names = set(re.findall(r"`(_?[A-Za-z_]{4,}(?:\.[a-z]+)?)`", PAGE.partition("## To add an objective")[2]))
    assert len(names) > 10
    assert [name for name in sorted(names) if name.rpartition(".")[2] not in source] == []

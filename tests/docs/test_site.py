"""The pages of docs/ become a site, without the network and without a warning."""

import subprocess
import sys
from pathlib import Path

from forked_python import ForkedPython

import layerwise
from layerwise.commands import layerwise as group
from layerwise.config import options

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_site_builds_and_its_references_are_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html"]
    done = ForkedPython([*command, "-d", tmp_path / "read", DOCS, tmp_path / "site"], stderr=subprocess.PIPE, text=True)
    err = done.communicate()[1]
    assert done.returncode == 0, err

    pages = {path.stem: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in DOCS.glob("*.md")} <= set(pages)
    for option in options():
        assert f">{option.key}<" in pages["reference-options"]
    for name in layerwise.__all__:
        assert name == "__version__" or f'id="layerwise.{name}"' in pages["reference-python"], name
    for name, command in group.commands.items():
        assert (f'id="layerwise-{name}"' in pages["reference-command-line"]) != command.hidden, name
    fetched = ("https://cdn", "https://fonts", "http://")
    assert not [source for page in pages.values() for source in sources(page) if source.startswith(fetched)]


def sources(page: str) -> list[str]:
    """Scripts and pictures that a browser would fetch."""
    return [piece.partition('"')[0] for piece in page.split(' src="')[1:]]

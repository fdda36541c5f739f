"""Links to folders are followed, each folder is read once, and no link leads in a circle."""

from pathlib import Path

import pytest
from PIL import Image

from layerwise.data.images import PatchOptions, open_images

GRAY = PatchOptions(picture=16, patch=8, patch_stride=8, gray=True, flip=False)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    for name in ("cat/1.png", "cat/2.png", "dog/deep/1.png"):
        (tmp_path / "real" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), len(name)).save(tmp_path / "real" / name)
    return tmp_path / "real"


def opened(folder: Path) -> tuple[list[str], list[str]]:
    """Ids, and what was skipped."""
    data = open_images(folder, GRAY)
    assert {entry.reason for entry in data.skipped} <= {"a link to a folder that is read already"}
    return data.ids, [entry.path for entry in data.skipped]


def test_linked_class_folders_are_classes(real: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(Path("..") / "real" / name)
    assert opened(tmp_path / "linked") == (["cat/1.png", "cat/2.png", "dog/deep/1.png"], [])
    assert open_images(tmp_path / "linked", GRAY).labels["class"].tolist() == ["cat", "cat", "dog"]


def test_a_link_to_all_of_it_is_entered_like_the_folder(real: Path, tmp_path: Path) -> None:
    (tmp_path / "all").symlink_to(real)
    assert opened(tmp_path / "all") == opened(real)


@pytest.mark.parametrize("link", ["again", "cat/up", "dog/deep/up", "cat/.hidden"])
def test_a_link_to_where_it_lies_is_no_endless_walk(real: Path, link: str) -> None:
    before, _ = opened(real)
    (real / link).symlink_to(real)
    assert opened(real) == (before, [] if "hidden" in link else [link])


def test_links_that_lead_to_each_other_end(real: Path, tmp_path: Path) -> None:
    for here, there in (("one", "two"), ("two", "one")):
        (tmp_path / here).mkdir()
        Image.new("L", (16, 16), 3).save(tmp_path / here / f"{here}.png")
        (tmp_path / here / "other").symlink_to(tmp_path / there)
    assert opened(tmp_path / "one") == (["one.png", "other/two.png"], ["other/other"])


def test_what_lies_here_itself_keeps_its_name(real: Path) -> None:
    """Though the link comes first in the order of names."""
    (real / "a").symlink_to(real / "dog")
    assert opened(real) == (["cat/1.png", "cat/2.png", "dog/deep/1.png"], ["a"])


@pytest.mark.parametrize("link", ["fish", "cat/old.v2", "dog/3.png"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_to_what_is_not_there_is_named(real: Path, link: str, target: str) -> None:
    """A class would be missing in silence."""
    (real / link).symlink_to(real / (link if target == "itself" else "gone"))
    data = open_images(real, GRAY)
    assert data.ids == ["cat/1.png", "cat/2.png", "dog/deep/1.png"]
    assert [(entry.path, entry.reason) for entry in data.skipped] == [(link, "a link to what is not there")]

"""A cache that is moved from one disk to another is there whole or not at all."""

from pathlib import Path

import pytest

from layerwise.cache import inventory as publishing
from layerwise.cache.inventory import publish
from layerwise.errors import CacheError, Interrupted
from layerwise.run_store import cache_files


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(publishing, "PIECE_BYTES", 1000)
    path = tmp_path / "fast" / "stage-1.h5"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 20)
    return path


def test_it_is_moved(written: Path, tmp_path: Path) -> None:
    content, polled = written.read_bytes(), []
    publish(written, tmp_path / "slow" / "stage-1.h5", lambda: polled.append(1))
    assert (tmp_path / "slow" / "stage-1.h5").read_bytes() == content
    assert not written.exists()
    assert len(polled) == 6


def test_a_stop_in_between_leaves_it_where_it_was_and_a_second_try_moves_it(written: Path, tmp_path: Path) -> None:
    content, path, polls = written.read_bytes(), tmp_path / "slow" / "stage-1.h5", iter(range(100))

    def stop() -> None:
        if next(polls) == 2:
            raise Interrupted("the test")

    with pytest.raises(Interrupted):
        publish(written, path, stop)
    assert [(file.path.name, file.is_sealed) for file in cache_files(path.parent)] == [("stage-1.h5.copying", False)]
    assert written.read_bytes() == content
    publish(written, path, lambda: None)
    assert [file.path.name for file in cache_files(path.parent)] == ["stage-1.h5"]
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_named(written: Path, tmp_path: Path) -> None:
    (tmp_path / "slow").write_text("a file")
    with pytest.raises(CacheError, match=r"slow.*cannot be written"):
        publish(written, tmp_path / "slow" / "stage-1.h5", lambda: None)
    assert written.exists()

"""Disks that fill up in the middle, that cannot be written to, and clocks that go backwards."""

import contextlib
import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from layerwise.config import Config
from layerwise.engines.run import RunResult, run
from layerwise.errors import LayerwiseError
from layerwise.events import CachingProgress, Event, StageStarted
from layerwise.run_store import RunState
from layerwise.training.cache_retention import remove_caches

Tiny = Callable[..., Config]
Finished = Callable[[Config], RunResult]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(filler: Path) -> None:
    """Leaves no byte free."""
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def bits(result: RunResult) -> dict[str, bytes]:
    caches = {path.name: path.read_bytes() for path in result.paths.caches.glob("stage-*")}
    return caches | {name: value.tobytes() for name, value in load_file(result.paths.encoder).items()}


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(
    tiny_speech: Tiny, digits: Path, small_disk: Path, tmp_path: Path, finished: Finished
) -> None:
    undisturbed = finished(tiny_speech(f"fsdd:{digits}"))
    elsewhere = {"out": str(tmp_path / "again"), "cache.dir": str(small_disk)}
    config = tiny_speech(f"fsdd:{digits}", **elsewhere)
    filler = small_disk / "filler"

    def fill_in_stage_2(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == 2:
            fill(filler)

    with pytest.raises(LayerwiseError, match=r"No room is left on the disk for .*stage-2\.h5"):
        run(config, notify=fill_in_stage_2)
    filler.unlink()
    assert bits(run(config)) == bits(undisturbed)


def test_a_disk_that_fills_up_before_a_cache_is_packed_loses_nothing(
    tiny_speech: Tiny, digits: Path, small_disk: Path, tmp_path: Path
) -> None:
    undisturbed = run(tiny_speech(f"fsdd:{digits}", **{"cache.compression": "zstd"}))
    elsewhere = {"out": str(tmp_path / "again"), "cache.dir": str(small_disk), "cache.compression": "zstd"}
    config = tiny_speech(f"fsdd:{digits}", **elsewhere)
    filler = small_disk / "filler"

    def fill_at_the_end_of_stage_1(event: Event) -> None:
        if isinstance(event, CachingProgress) and event.rows == event.total and not filler.exists():
            left = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(left - 200_000))  # the rows are there, but not what they are packed into

    with pytest.raises(LayerwiseError, match=r"No room is left on the disk for .*stage-1\.h5\.packing"):
        run(config, notify=fill_at_the_end_of_stage_1)
    assert RunState.load(tmp_path / "again" / "run.json").record(1).status == "caching"
    filler.unlink()
    assert bits(run(config)) == bits(undisturbed)


def test_removing_caches_frees_a_disk_that_is_entirely_full(tiny_speech: Tiny, digits: Path, small_disk: Path) -> None:
    places = {"out": str(small_disk / "run"), "cache.dir": str(small_disk / "cache")}
    config = tiny_speech(f"fsdd:{digits}", **places, **{"training.max_epochs": 1})
    result = run(config)
    before = bits(result)
    fill(small_disk / "filler")
    assert remove_caches(small_disk / "run", None) > 0
    (small_disk / "filler").unlink()
    assert not any(record.cache for record in RunState.load(small_disk / "run" / "run.json").stages)
    assert bits(run(config)) == before


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tiny_speech: Tiny, digits: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for place in ("out", "cache.dir"):
        with pytest.raises(
            LayerwiseError, match=rf"{small_disk}.* cannot be written: (Read-only file system|.* does not let you)"
        ):
            run(tiny_speech(f"fsdd:{digits}", **{place: str(small_disk / "run")}))


def test_a_clock_that_goes_backwards_changes_nothing(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Finished
) -> None:
    undisturbed = finished(tiny_speech(f"fsdd:{digits}"))
    backwards = itertools.count(2 * 10**9, -100)
    monkeypatch.setattr(time, "time", lambda: next(backwards))
    again = {"out": str(tmp_path / "again"), "cache.dir": str(tmp_path / "again-cache")}
    result = run(tiny_speech(f"fsdd:{digits}", **again))
    assert bits(result) == bits(undisturbed)
    assert all(record.seconds >= 0 for record in result.state.stages)

"""Disks that fill up in the middle, that cannot be written to, and clocks that go backwards."""

import contextlib
import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from layerwise.config import Config
from layerwise.engines.run import RunResult, run
from layerwise.errors import LayerwiseError
from layerwise.events import Event, StageStarted

Tiny = Callable[..., Config]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def bits(result: RunResult) -> dict[str, bytes]:
    caches = {path.name: path.read_bytes() for path in result.paths.caches.glob("stage-*")}
    return caches | {name: value.tobytes() for name, value in load_file(result.paths.encoder).items()}


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(
    tiny_speech: Tiny, digits: Path, small_disk: Path, tmp_path: Path
) -> None:
    undisturbed = run(tiny_speech(f"fsdd:{digits}"))
    elsewhere = {"out": str(tmp_path / "again"), "cache.dir": str(small_disk)}
    config = tiny_speech(f"fsdd:{digits}", **elsewhere)
    filler = small_disk / "filler"

    def fill_in_stage_2(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == 2:
            with filler.open("wb", buffering=0) as file:
                for size in (2**16, 2**12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)) == size:
                            pass

    with pytest.raises(LayerwiseError, match=r"No room is left on the disk for .*stage-2\.h5"):
        run(config, notify=fill_in_stage_2)
    filler.unlink()
    assert bits(run(config)) == bits(undisturbed)


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tiny_speech: Tiny, digits: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for place in ("out", "cache.dir"):
        with pytest.raises(LayerwiseError, match=f"{small_disk}.* cannot be written: Read-only file system"):
            run(tiny_speech(f"fsdd:{digits}", **{place: str(small_disk / "run")}))


def test_a_clock_that_goes_backwards_changes_nothing(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(tiny_speech(f"fsdd:{digits}"))
    backwards = itertools.count(2 * 10**9, -100)
    monkeypatch.setattr(time, "time", lambda: next(backwards))
    again = {"out": str(tmp_path / "again"), "cache.dir": str(tmp_path / "again-cache")}
    result = run(tiny_speech(f"fsdd:{digits}", **again))
    assert bits(result) == bits(undisturbed)
    assert all(record.seconds >= 0 for record in result.state.stages)

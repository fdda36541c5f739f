"""Caches that are written on a fast disk first."""

from collections.abc import Callable
from pathlib import Path

import pytest

from layerwise.config import Config
from layerwise.engines.run import RunResult, run
from layerwise.errors import ConfigError, Interrupted
from layerwise.events import CachingProgress, Event, StepDone
from layerwise.stop import StopFlag

Tiny = Callable[..., Config]
Finished = Callable[[Config], RunResult]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("stage-*")}


def test_they_end_in_their_place_with_the_same_bytes(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Finished
) -> None:
    monkeypatch.setenv("FAST", str(tmp_path / "fast"))
    plain = finished(tiny_speech(f"fsdd:{digits}"))
    scratch = run(tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "other"), **{"cache.scratch": "$FAST"}))
    assert contents(scratch.paths.caches) == contents(plain.paths.caches)
    assert not contents(tmp_path / "fast")


def test_a_stop_goes_on_from_what_lies_there(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished
) -> None:
    plain = finished(tiny_speech(f"fsdd:{digits}"))
    config = tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "other"), **{"cache.scratch": str(tmp_path / "fast")})
    stop = StopFlag()

    def stop_at(event: Event) -> None:
        if isinstance(event, CachingProgress) and event.stage == 1 and event.rows >= event.total / 2:
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=stop_at)
    assert contents(tmp_path / "fast")
    events: list[Event] = []
    result = run(config, notify=events.append)
    assert not any(isinstance(event, StepDone) and event.stage == 1 for event in events)
    assert contents(result.paths.caches) == contents(plain.paths.caches)
    assert not contents(tmp_path / "fast")


def test_a_variable_that_is_not_set_is_named_before_anything_is_trained(tiny_speech: Tiny, digits: Path) -> None:
    events: list[Event] = []
    with pytest.raises(ConfigError, match=r"cache.scratch \$NOWHERE_AT_ALL: the variable is not set"):
        run(tiny_speech(f"fsdd:{digits}", **{"cache.scratch": "$NOWHERE_AT_ALL"}), notify=events.append)
    assert not any(isinstance(event, StepDone) for event in events)


def test_what_an_earlier_training_has_left_there_is_not_taken_for_this_one(
    tiny_speech: Tiny, digits: Path, tmp_path: Path
) -> None:
    config = tiny_speech(f"fsdd:{digits}", **{"cache.scratch": str(tmp_path / "fast")})
    result = run(config)
    (folder,) = [tmp_path / "fast" / f"layerwise-{result.state.run_id}"]
    folder.mkdir()
    (folder / "stage-2.h5").write_bytes(result.paths.cache(1).read_bytes())
    expected = contents(result.paths.caches)
    run(config, from_stage=2)
    assert contents(result.paths.caches) == expected

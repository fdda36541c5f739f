"""Device memory over time: what a run leaves in memory.jsonl, after a stop, a kill and a retraining too."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest

from layerwise.config import Config
from layerwise.engines.run import run
from layerwise.errors import Interrupted
from layerwise.events import CachingProgress, Event, StepDone, silent
from layerwise.files import json_lines
from layerwise.stop import StopFlag
from layerwise.training.memory_log import MemoryLog

Tiny = Callable[..., Config]


class NoMeter:
    """What the record asks a meter for."""

    live = peak = 0


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def step(live: int = 10, peak: int = 20) -> StepDone:
    return StepDone(1, 0, 0, 5, 2.0, 0.1, live, peak)


def test_a_run_records_what_each_pass_holds_on_the_device(tiny_speech: Tiny, few_digits: Path) -> None:
    events: list[Event] = []
    options = {"memory.gpu_mem": "50MB", "net.context": 0}  # to rehearse a recurrent layer takes seconds
    result = run(tiny_speech(f"fsdd:{few_digits}", **options), notify=events.append)
    for record in result.state.stages:
        lines = json_lines(result.paths.memory(record.stage))
        assert all(line.keys() == {"seconds", "pass", "live_bytes", "peak_bytes"} for line in lines)
        assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
        passes = [name for name, _ in groupby(line["pass"] for line in lines)]
        assert passes == ["training", "held-out"] * 2 + ["caching"]
        training = [line for line in lines if line["pass"] != "caching"]
        caching = [line for line in lines if line["pass"] == "caching"]
        assert max(line["peak_bytes"] for line in training) == record.train_peak_bytes
        assert caching[-1]["peak_bytes"] == record.cache_peak_bytes
        assert all(0 < line["live_bytes"] <= line["peak_bytes"] < 50_000_000 for line in lines)
    progress = [event for event in events if isinstance(event, CachingProgress)]
    assert all(0 < event.live_bytes <= event.peak_bytes for event in progress)


def test_at_most_a_line_a_second_and_the_first_and_last_of_each_pass(tmp_path: Path) -> None:
    clock = Clock()
    with MemoryLog(tmp_path / "memory.jsonl", NoMeter(), silent, clock) as record:
        for number in range(50):  # a step every 0.1 s
            clock.now += 0.1
            record(step(live=number))
        for rows in range(3):
            clock.now += 0.1
            record(CachingProgress(1, rows, 3, rows, 7))
    lines = json_lines(tmp_path / "memory.jsonl")
    training = [line["live_bytes"] for line in lines if line["pass"] == "training"]
    assert (training[0], training[-1], len(training)) == (0, 49, 6)
    assert [line["live_bytes"] for line in lines if line["pass"] == "caching"] == [0, 2]


def test_a_record_goes_on_after_a_line_that_a_kill_has_torn(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    whole = json.dumps({"seconds": 42.0, "pass": "training", "live_bytes": 1, "peak_bytes": 2}) + "\n"
    path.write_text(whole + '{"seconds": 43.1, "pa')
    assert [line["seconds"] for line in json_lines(path)] == [42.0]
    clock = Clock()
    with MemoryLog(path, NoMeter(), silent, clock) as record:
        clock.now += 1.5
        record(step())
    assert [line["seconds"] for line in json_lines(path)] == [42.0, 43.5]
    assert path.read_text().startswith(whole)


def test_a_stopped_run_goes_on_in_the_same_record(tiny_speech: Tiny, few_digits: Path) -> None:
    config, stop = tiny_speech(f"fsdd:{few_digits}"), StopFlag()

    def stop_in_the_second_epoch(event: Event) -> None:
        if isinstance(event, StepDone) and event.epoch == 1:
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=stop_in_the_second_epoch)
    path = Path(config.out) / "stages" / "1" / "memory.jsonl"
    before = path.read_text()
    run(config)
    assert path.read_text().startswith(before)
    seconds = [line["seconds"] for line in json_lines(path)]
    assert seconds == sorted(seconds)


def test_retraining_a_stage_records_anew(tiny_speech: Tiny, few_digits: Path) -> None:
    config = tiny_speech(f"fsdd:{few_digits}")
    paths = run(config).paths
    kept, replaced = paths.memory(1).read_text(), paths.memory(2).read_text()
    run(config, from_stage=2)
    assert paths.memory(1).read_text() == kept
    assert not paths.memory(2).read_text().startswith(replaced)
    assert json_lines(paths.memory(2))[0]["pass"] == "training"


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    seen: list[Event] = []
    with MemoryLog(tmp_path / "missing" / "memory.jsonl", NoMeter(), seen.append) as record:
        record(step())
    assert seen == [step()]

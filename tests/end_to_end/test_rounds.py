"""Rounds: stages that go on from what the others have published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from layerwise.config import Config, with_options
from layerwise.engines.run import RunResult, run
from layerwise.engines.task_runner import open_prepared_run, perform_task
from layerwise.errors import ConfigError, Interrupted, RunError
from layerwise.events import EpochDone, Event, StageDone, StageStarted, StepDone, silent
from layerwise.files import exclusive
from layerwise.run_store import RunState, RunStore
from layerwise.stop import StopFlag
from layerwise.training.schedule import Task

Tiny = Callable[..., Config]
Finished = Callable[[Config], RunResult]
ROUNDS = {"training.rounds": 2, "training.max_epochs": 3, "cache.keep": "needed"}


def bits(out: str | Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(Path(out) / "encoder.safetensors").items()}


@pytest.fixture
def config(tiny_speech: Tiny, digits: Path) -> Config:
    return tiny_speech(f"fsdd:{digits}", **ROUNDS)


@pytest.fixture
def undisturbed(tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished) -> dict[str, bytes]:
    """The bits of the run of `config`, made elsewhere."""
    other = tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "undisturbed"), **ROUNDS)
    finished(other)
    return bits(other.out)


def test_each_round_trains_its_share_and_goes_on_where_the_one_before_ended(config: Config) -> None:
    events: list[Event] = []
    result = run(config, notify=events.append)
    begun = [(event.round, event.stage, event.epoch) for event in events if isinstance(event, StageStarted)]
    assert begun == [(1, s, 0) for s in range(1, 5)] + [(2, s, 1) for s in range(1, 5)]
    assert [event.round for event in events if isinstance(event, StageDone)] == [1] * 4 + [2] * 4
    assert [event.epoch for event in events if isinstance(event, EpochDone)] == [1] * 4 + [2, 3] * 4
    assert {record.epochs for record in result.state.stages} == {3}
    for stage in range(1, 5):
        lines = result.paths.metrics(stage).read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_one_round_is_sequential_training(tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished) -> None:
    """With one round nothing is left of rounds; with two, each stage has heard the lower ones when they knew less."""
    alone = finished(tiny_speech(f"fsdd:{digits}"))
    assert not (alone.paths.out / "rounds").exists()
    both = run(tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "both"), **{"training.rounds": 2}))
    first, second = (load_file(result.paths.encoder) for result in (alone, both))
    # Stage 1 has the same input in every round; its epochs are the same, and so is what it learns.
    assert all((first[name] == second[name]).all() for name in first if name.startswith("0."))
    assert any((first[name] != second[name]).any() for name in first)


def test_versions_go_when_nobody_needs_them(config: Config, finished: Finished) -> None:
    result = finished(config)
    assert sorted(path.name for path in result.paths.caches.rglob("stage-*")) == ["stage-3.h5", "stage-4.h5"]
    assert not list(result.paths.out.rglob("checkpoint.safetensors"))
    state = RunState.load(result.paths.out / "rounds" / "1" / "run.json")
    assert state.done


@pytest.mark.parametrize("steps", [3, 14, 26, 33])
def test_a_stop_anywhere_ends_with_the_same_bits(config: Config, undisturbed: dict[str, bytes], steps: int) -> None:
    stop, seen = StopFlag(), 0

    def stop_there(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StepDone)
        if seen == steps:
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=stop_there)
    run(config)
    assert bits(config.out) == undisturbed


def test_a_finished_run_needs_its_rounds_no_more(
    config: Config, undisturbed: dict[str, bytes], finished: Finished
) -> None:
    result = finished(config)
    shutil.rmtree(result.paths.out / "rounds")
    result.paths.cache(4).unlink()
    events: list[Event] = []
    again = run(config, notify=events.append)
    assert again.paths.cache(4).exists()
    assert not any(isinstance(event, EpochDone) for event in events)
    assert bits(config.out) == undisturbed


def test_an_end_that_was_lost_is_trained_again(config: Config, undisturbed: dict[str, bytes]) -> None:
    stop = StopFlag()

    def stop_in_the_second_round(event: Event) -> None:
        if isinstance(event, StageDone) and (event.round, event.stage) == (2, 2):
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=stop_in_the_second_round)
    first = RunStore.of(config.out, config.cache.dir).round(1, 2)
    first.checkpoint(4).unlink()
    events: list[Event] = []
    run(config, notify=events.append)
    begun = [(event.round, event.stage) for event in events if isinstance(event, StageStarted)]
    assert begun == [(1, 4), (2, 3), (2, 4)]
    assert bits(config.out) == undisturbed


def test_a_damaged_version_is_made_again(config: Config, undisturbed: dict[str, bytes]) -> None:
    stop = StopFlag()

    def stop_in_the_first_round(event: Event) -> None:
        if isinstance(event, StageDone) and (event.round, event.stage) == (1, 2):
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=stop_in_the_first_round)
    cache = RunStore.of(config.out, config.cache.dir).round(1, 2).cache(2)
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    cache.write_bytes(content)
    run(config)
    assert bits(config.out) == undisturbed


def test_stages_are_retrained_in_every_round(config: Config, undisturbed: dict[str, bytes], finished: Finished) -> None:
    finished(config)
    events: list[Event] = []
    run(config, from_stage=3, notify=events.append)
    begun = [(event.round, event.stage) for event in events if isinstance(event, StageStarted)]
    assert begun == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert bits(config.out) == undisturbed


def test_a_task_that_comes_too_early_is_refused(config: Config, undisturbed: dict[str, bytes]) -> None:
    """As a batch job would that an earlier start has handed in."""
    stop = StopFlag()

    def stop_in_the_first_stage(event: Event) -> None:
        if isinstance(event, StepDone):
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=stop_in_the_first_stage)
    with pytest.raises(RunError, match="Stage 1 of round 2 needs round 1, where that stage is training"):
        perform_task(Task(2, 1), open_prepared_run(Path(config.out), {}), StopFlag(), silent)
    run(config)
    assert bits(config.out) == undisturbed


def test_rounds_that_were_deleted_do_not_stand_in_the_way(
    config: Config, undisturbed: dict[str, bytes], finished: Finished
) -> None:
    result = finished(config)
    shutil.rmtree(result.paths.out / "rounds")
    run(config, from_stage=3)
    assert bits(config.out) == undisturbed
    shutil.rmtree(result.paths.out / "rounds")
    run(config, overwrite=True)
    assert bits(config.out) == undisturbed


def test_what_is_refused_changes_nothing(config: Config) -> None:
    stop = StopFlag()

    def stop_in_the_first_stage(event: Event) -> None:
        if isinstance(event, EpochDone):
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=stop_in_the_first_stage)
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*.*") if path.is_file()}
    with pytest.raises(ConfigError, match="--lr"):
        run(with_options(config, {"training.lr": 0.5}))
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*.*") if path.is_file()} == before


def test_a_round_that_somebody_works_on_is_not_overwritten(config: Config, finished: Finished) -> None:
    finished(config)
    lock = Path(config.out) / "rounds" / "1" / "task.lock"
    with exclusive(lock, RunError("")), pytest.raises(RunError, match=r"rounds/1 is being performed"):
        run(with_options(config, {"training.rounds": 1}), overwrite=True)
    assert (Path(config.out) / "encoder.safetensors").exists()


def test_overwriting_leaves_no_round_of_before(
    config: Config, tiny_speech: Tiny, digits: Path, finished: Finished
) -> None:
    finished(config)
    result = run(tiny_speech(f"fsdd:{digits}"), overwrite=True)
    # A lock file must outlive what it guards: whoever waits for it would hold another one than the next to come.
    assert {path.name for path in (result.paths.out / "rounds").rglob("*") if path.is_file()} == {"task.lock"}
    assert not list(result.paths.caches.glob("round-*/*.h5"))


def test_rounds_that_cannot_be(tiny_speech: Tiny, digits: Path) -> None:
    with pytest.raises(ConfigError, match=r"--rounds 5 .* --max-epochs 2"):
        tiny_speech(f"fsdd:{digits}", **{"training.rounds": 5})
    with pytest.raises(ConfigError, match=r"--rounds .*simultaneous"):
        tiny_speech(f"fsdd:{digits}", **{"training.rounds": 2, "training.schedule": "simultaneous"})

"""Going on differently: more epochs from where the stages stand, and more data from what another run has learnt."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from layerwise.config import Config, with_options
from layerwise.engines.run import RunResult, UserObjects, prepared_run, run, tasks_left
from layerwise.engines.task_runner import open_prepared_run, perform_task, write_encoder
from layerwise.errors import ConfigError, Interrupted, RunError
from layerwise.events import CachingProgress, Event, StageStarted, StepDone, silent
from layerwise.files import json_lines
from layerwise.stop import StopFlag
from layerwise.training.resume import StartRequest

Tiny = Callable[..., Config]
Finished = Callable[[Config], RunResult]
MORE = {"training.max_epochs": 3}
"""Where the tiny run has had two."""
SLOW_STEP = 1.0
"""Seconds; more than an epoch of a tiny stage takes."""


def bits(path: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(path).items()}


def started(config: Config, **others: object) -> list[tuple[int, int, int]]:
    """Runs it; gives stage, epoch and step at which each stage was begun."""
    events: list[Event] = []
    run(config, notify=events.append, **others)
    return [(event.stage, event.epoch, event.step) for event in events if isinstance(event, StageStarted)]


@pytest.fixture
def further(tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished) -> Callable[[str], Config]:
    """further(name): a finished run of two epochs in a folder of that name, and its options with three."""

    def finish(name: str) -> Config:
        places = {"out": str(tmp_path / name / "run"), "cache.dir": str(tmp_path / name / "cache")}
        finished(tiny_speech(f"fsdd:{digits}", **places))
        return tiny_speech(f"fsdd:{digits}", **places, **MORE)

    return finish


@pytest.fixture
def undisturbed(further: Callable[[str], Config]) -> dict[str, bytes]:
    """The bits of a run that was trained further, and that nobody stopped."""
    config = further("undisturbed")
    assert started(config) == [(stage, 2, 0) for stage in range(1, 5)]
    return bits(Path(config.out) / "encoder.safetensors")


@pytest.mark.parametrize(("kind", "number"), [(StepDone, 1), (StepDone, 8), (CachingProgress, 10), (StepDone, 18)])
def test_more_epochs_that_were_stopped_anywhere_end_with_the_same_bits(
    further: Callable[[str], Config], undisturbed: dict[str, bytes], kind: type, number: int
) -> None:
    config, stop, seen = further("stopped"), StopFlag(), 0
    worked = [stage["seconds"] for stage in json.loads((Path(config.out) / "run.json").read_text())["stages"]]

    def notify(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, kind)
        if seen == number and not stop.reason:
            stop.reason = "the test"
            if isinstance(event, StepDone):
                time.sleep(SLOW_STEP)
                worked[event.stage - 1] += SLOW_STEP

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=notify)
    result = run(config)
    assert bits(result.paths.encoder) == undisturbed
    assert [[line["epoch"] for line in json_lines(result.paths.metrics(stage))] for stage in (1, 4)] == [[1, 2, 3]] * 2
    after = [record.seconds for record in result.state.stages]
    assert all(more > less for more, less in zip(after, worked, strict=True)), (
        "what was worked on before the stop counts"
    )
    assert started(config) == []


def test_more_epochs_in_another_process_end_with_the_same_bits(
    further: Callable[[str], Config], undisturbed: dict[str, bytes]
) -> None:
    """Which knows nothing but the folder of the run, and opens it anew for each task."""
    config = further("elsewhere")
    with prepared_run(config, UserObjects(), StartRequest(), StopFlag(), silent) as (prepared, tasks, _):
        for task in tasks:
            perform_task(task, open_prepared_run(Path(config.out), {}), StopFlag(), silent)
        write_encoder(prepared)
    assert bits(Path(config.out) / "encoder.safetensors") == undisturbed


def test_more_epochs_of_a_single_stage_give_the_bits_of_as_many_at_once(
    tiny_speech: Tiny, digits: Path, tmp_path: Path
) -> None:
    one = {"training.stages": 1}
    before = run(tiny_speech(f"fsdd:{digits}", **one))
    further = run(tiny_speech(f"fsdd:{digits}", **one, **MORE))
    at_once = run(tiny_speech(f"fsdd:{digits}", **one, **MORE, out=str(tmp_path / "at-once")))
    assert bits(further.paths.encoder) == bits(at_once.paths.encoder)
    assert further.state.stages[0].best_loss == at_once.state.stages[0].best_loss
    assert further.state.stages[0].seconds > before.state.stages[0].seconds, "all that it was worked on"


def test_more_epochs_from_a_stage_on_leave_those_below(further: Callable[[str], Config]) -> None:
    config = further("some")
    before = bits(Path(config.out) / "encoder.safetensors")
    assert started(config, from_stage=3) == [(3, 2, 0), (4, 2, 0)]
    after = bits(Path(config.out) / "encoder.safetensors")
    changed = {name.split(".")[1] for name in before if before[name] != after[name]}
    assert "3" in changed and changed <= {"2", "3"}  # stage 3 keeps its best epoch, which may be an earlier one
    assert started(config) == []


def test_stages_that_more_epochs_leave_out_because_of_an_earlier_from_stage_are_named(
    further: Callable[[str], Config],
) -> None:
    config, said = further("left-out"), []
    run(config, from_stage=3, notify=said.append)
    assert not any("stay as they are" in str(event) for event in said)
    more = with_options(config, {"training.max_epochs": 4})
    run(more, notify=said.append)
    assert any(
        "the stages below 3 stay as they are, for --from-stage 3 has left them out" in str(event) for event in said
    )
    assert started(more, from_stage=1) == [(1, 2, 0), (2, 2, 0), (3, 4, 0), (4, 4, 0)]


def test_batch_jobs_are_handed_in_for_the_stages_that_go_on(further: Callable[[str], Config]) -> None:
    config = further("jobs")
    assert [task.stage for task in tasks_left(config, StartRequest())] == [1, 2, 3, 4]
    assert [task.stage for task in tasks_left(config, StartRequest(from_stage=3))] == [3, 4]


def test_more_epochs_asked_for_in_the_middle_of_a_stage(tiny_speech: Tiny, digits: Path) -> None:
    """Stage 1 has ended and goes on; stage 2, in its second epoch, goes on from its last step on another input."""
    config, stop, seen = tiny_speech(f"fsdd:{digits}"), StopFlag(), 0

    def notify(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StepDone)
        if seen == 17:
            stop.reason = "the test"

    with pytest.raises(Interrupted, match="stage 2, epoch 2, after step 2"):
        run(config, stop=stop, notify=notify)
    assert started(with_options(config, MORE)) == [(1, 2, 0), (2, 1, 0), (3, 0, 0), (4, 0, 0)]


def test_a_stage_that_has_converged_stays_as_it_is(tiny_speech: Tiny, digits: Path) -> None:
    hasty = {"training.patience": 1, "training.min_delta": 0.9}
    hasty |= {"objective.name": "supervised", "objective.label": "digit"}  # the default does not converge at chance
    result = run(tiny_speech(f"fsdd:{digits}", **hasty))
    assert all(record.converged for record in result.state.stages)
    assert started(tiny_speech(f"fsdd:{digits}", **hasty, **MORE)) == []


def test_a_stage_whose_checkpoint_was_deleted_goes_on_from_its_weights(further: Callable[[str], Config]) -> None:
    config = further("lost")
    before = load_file(Path(config.out) / "encoder.safetensors")
    for checkpoint in Path(config.out).rglob("checkpoint.safetensors"):
        checkpoint.unlink()
    assert started(with_options(config, {"training.lr": 1e-12}), from_stage=4) != [], "another option retrains"
    shutil.rmtree(config.out)
    config = further("lost-again")
    for checkpoint in Path(config.out).rglob("checkpoint.safetensors"):
        checkpoint.unlink()
    assert started(config) == [(stage, 2, 0) for stage in range(1, 5)]
    after = load_file(Path(config.out) / "encoder.safetensors")
    moved, apart = (
        np.mean([np.abs(after[name] - other[name]).mean() for name in after])
        for other in (before, {name: np.roll(value, 1) for name, value in before.items()})
    )
    assert 0 < moved < apart / 2


def test_rounds_share_their_epochs_out_once_and_for_all(tiny_speech: Tiny, digits: Path) -> None:
    rounds = {"training.rounds": 2}
    run(tiny_speech(f"fsdd:{digits}", **rounds))
    with pytest.raises(ConfigError, match=r"--max-epochs .* was 2 .* is 3 now"):
        run(tiny_speech(f"fsdd:{digits}", **rounds, **MORE))


def test_fewer_epochs_than_a_stage_was_trained_are_refused(tiny_speech: Tiny, digits: Path, finished: Finished) -> None:
    source = f"fsdd:{digits}"
    finished(tiny_speech(source))
    with pytest.raises(ConfigError, match=r"--max-epochs .* was 2 .* is 1 now"):
        run(tiny_speech(source, **{"training.max_epochs": 1}))


def test_more_data_begin_with_what_another_run_had_learnt_whatever_has_become_of_it(
    tiny_speech: Tiny, digits: Path, few_digits: Path, tmp_path: Path
) -> None:
    old = run(tiny_speech(f"fsdd:{few_digits}", out=str(tmp_path / "old")))
    learnt = load_file(old.paths.encoder)
    still = {"training.lr": 1e-12, "training.warm_start": str(old.paths.out)}
    config, stop = tiny_speech(f"fsdd:{digits}", **still), StopFlag()

    def notify(event: Event) -> None:
        if isinstance(event, StepDone):
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=notify)
    run(tiny_speech(f"fsdd:{few_digits}", out=str(old.paths.out), **{"training.seed": 7}), overwrite=True)
    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=notify)
    shutil.rmtree(old.paths.out)
    result = run(config)
    assert all(np.allclose(value, learnt[name], atol=1e-6) for name, value in load_file(result.paths.encoder).items())


def test_a_warm_start_that_does_not_fit_is_refused(
    tiny_speech: Tiny, few_digits: Path, tmp_path: Path, finished: Finished
) -> None:
    source = f"fsdd:{few_digits}"
    old = finished(tiny_speech(source))
    warm = {"training.warm_start": str(old.paths.out)}
    with pytest.raises(ConfigError, match="its network is not the one of this run"):
        run(tiny_speech(source, **warm, **{"net.width": 6}, out=str(tmp_path / "narrow")))
    assert not (tmp_path / "narrow").exists()
    for own in (old.paths.out, old.paths.encoder):
        with pytest.raises(ConfigError, match="lies in the run's own folder"):
            run(tiny_speech(source, **{"training.warm_start": str(own)}), overwrite=True)
        assert old.paths.encoder.exists()
    run(tiny_speech(source, out=str(tmp_path / "cold")))
    with pytest.raises(ConfigError, match="was not begun with these weights"):
        run(tiny_speech(source, **warm, out=str(tmp_path / "cold")))


def test_other_data_are_named(tiny_speech: Tiny, digits: Path, few_digits: Path, finished: Finished) -> None:
    finished(tiny_speech(f"fsdd:{digits}"))
    with pytest.raises(RunError, match=f"The data set fsdd:{few_digits} is not the one .*, which was fsdd:{digits}"):
        run(tiny_speech(f"fsdd:{few_digits}"))

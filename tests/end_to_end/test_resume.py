"""Starting again: after a signal, a kill, a changed option, a wish to retrain."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

from layerwise.config import Config, load
from layerwise.engines.run import run
from layerwise.errors import ConfigError, Interrupted, LayerwiseError, RunError
from layerwise.events import CachingProgress, Event, StageStarted, StepDone
from layerwise.files import exclusive
from layerwise.run_directory import RunState
from layerwise.stop import StopFlag

Tiny = Callable[..., Config]


def bits(path: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(path).items()}


def stop_at(kind: type, number: int) -> tuple[StopFlag, Callable[[Event], None]]:
    """A flag that is set at the number-th event of a kind, counted from 1."""
    flag, seen = StopFlag(), 0

    def notify(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, kind)
        if seen == number:
            flag.reason = "the test"

    return flag, notify


@pytest.fixture
def undisturbed(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> dict[str, bytes]:
    """The bits of a run that nobody stopped."""
    return bits(run(tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "undisturbed"))).paths.encoder)


@pytest.mark.parametrize(("kind", "number"), [(StepDone, 1), (StepDone, 13), (StepDone, 40), (CachingProgress, 20)])
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bits(
    tiny_speech: Tiny, digits: Path, undisturbed: dict[str, bytes], kind: type, number: int
) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    stop, notify = stop_at(kind, number)
    with pytest.raises(Interrupted, match="start the same command again"):
        run(config, stop=stop, notify=notify)
    assert bits(run(config).paths.encoder) == undisturbed


def test_a_run_that_is_stopped_after_every_few_steps_ends_with_the_same_bits(
    tiny_speech: Tiny, digits: Path, undisturbed: dict[str, bytes]
) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    for _ in range(100):
        stop, notify = stop_at(StepDone, 3)
        try:
            result = run(config, stop=stop, notify=notify)
            break
        except Interrupted:
            continue
    assert bits(result.paths.encoder) == undisturbed


def test_a_resume_goes_on_in_the_middle_of_an_epoch(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    stop, notify = stop_at(StepDone, 8)  # five steps make an epoch
    with pytest.raises(Interrupted, match="stage 1, epoch 2, after step 3"):
        run(config, stop=stop, notify=notify)
    events: list[Event] = []
    run(config, notify=events.append)
    assert next(event for event in events if isinstance(event, StageStarted)) == StageStarted(1, epoch=1, step=3)


def test_a_resume_writes_only_the_missing_blocks_of_a_cache(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    stop, notify = stop_at(CachingProgress, 20)
    with pytest.raises(Interrupted, match="in the cache of stage 1"):
        run(config, stop=stop, notify=notify)
    events: list[Event] = []
    result = run(config, notify=events.append)
    assert not any(isinstance(event, StageStarted) and event.stage == 1 for event in events)
    rewritten = [event for event in events if isinstance(event, CachingProgress) and event.stage == 1]
    assert 0 < len(rewritten) < 48
    assert result.state.done


def test_a_finished_run_is_not_trained_again(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    run(config)
    events: list[Event] = []
    run(config, notify=events.append)
    assert not any(isinstance(event, StageStarted) for event in events)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.lr", 0.01, r"--lr \(training.lr\) was 0.001 .* is 0.01 now.*--from-stage 1"),
        ("objective.negatives", 7, r"objective.negatives was 4 .* is 7 now"),
        ("net.width", 9, r"net.width was 8 .* is 9 now.*--overwrite or another --out"),
        ("training.seed", 3, r"--seed .* was 0"),
    ],
)
def test_a_changed_option_is_named_with_the_ways_on(
    tiny_speech: Tiny, digits: Path, key: str, value: object, message: str
) -> None:
    source = f"fsdd:{digits}"
    result = run(tiny_speech(source))
    before = bits(result.paths.encoder)
    with pytest.raises(ConfigError, match=message):
        run(tiny_speech(source, **{key: value}))
    assert bits(result.paths.encoder) == before
    assert run(tiny_speech(source)).state.done


def test_options_of_place_may_change(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    stop, notify = stop_at(StepDone, 7)
    with pytest.raises(Interrupted):
        run(tiny_speech(f"fsdd:{digits}"), stop=stop, notify=notify)
    (tmp_path / "elsewhere").symlink_to(digits)
    changed = {"memory.gpu_mem": "1GB", "training.checkpoint_seconds": 0}
    assert run(tiny_speech(f"fsdd:{tmp_path / 'elsewhere'}", **changed)).state.done


def test_from_stage_retrains_from_the_cache_below_and_keeps_the_rest(tiny_speech: Tiny, digits: Path) -> None:
    source = f"fsdd:{digits}"
    first = run(tiny_speech(source))
    kept = first.paths.cache(2).read_bytes()
    before = bits(first.paths.encoder)
    retrained = run(tiny_speech(source, **{"training.lr": 0.01}), from_stage=3)
    after = bits(retrained.paths.encoder)
    assert retrained.paths.cache(2).read_bytes() == kept
    changed = {name.split(".")[1] for name in before if before[name] != after[name]}
    assert changed == {"2", "3"}  # layers count from 0
    again = run(tiny_speech(source), from_stage=3)
    assert bits(again.paths.encoder) == before


def test_from_stage_that_was_stopped_goes_on_and_does_not_begin_again(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    run(config)
    stop, notify = stop_at(StepDone, 7)
    with pytest.raises(Interrupted):
        run(config, from_stage=3, stop=stop, notify=notify)
    events: list[Event] = []
    run(config, from_stage=3, notify=events.append)
    assert next(event for event in events if isinstance(event, StageStarted)) == StageStarted(3, epoch=1, step=2)


@pytest.mark.parametrize(("stage", "error"), [(0, ConfigError), (5, ConfigError), (2, RunError)])
def test_a_from_stage_that_cannot_be_is_refused(tiny_speech: Tiny, digits: Path, stage: int, error: type) -> None:
    with pytest.raises(error, match=f"--from-stage {stage}"):
        run(tiny_speech(f"fsdd:{digits}"), from_stage=stage)


def test_a_changed_data_set_is_noticed(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in digits.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    run(tiny_speech(f"fsdd:{folder}"))
    next(folder.glob("*_5.wav")).unlink()
    with pytest.raises(RunError, match="The data set is not the one"):
        run(tiny_speech(f"fsdd:{folder}"))


def test_a_damaged_cache_is_named_and_not_used(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    stop, notify = stop_at(StageStarted, 2)
    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=notify)
    cache = Path(RunState.load(Path(config.out) / "run.json").record(1).cache or "")
    with h5py.File(cache) as file:
        position = file["activations"].id.get_offset() + 5000
    content = bytearray(cache.read_bytes())
    content[position] ^= 1
    cache.write_bytes(content)
    with pytest.raises(LayerwiseError, match=r"stage-1\.h5 is damaged"):
        run(config)


def test_overwrite_begins_anew_and_leaves_a_users_own_files(tiny_speech: Tiny, digits: Path) -> None:
    source = f"fsdd:{digits}"
    first = run(tiny_speech(source))
    (first.paths.out / "notes.txt").write_text("mine")
    second = run(tiny_speech(source, **{"net.width": 6}), overwrite=True)
    assert (second.paths.out / "notes.txt").read_text() == "mine"
    assert load_file(second.paths.encoder)["layers.0.weight"].shape == (6, 1, 10)


def test_a_folder_that_holds_something_else_is_refused(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    Path(config.out).mkdir()
    (Path(config.out) / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"holds something else \(thesis.tex\)"):
            run(config, overwrite=overwrite)
    assert [path.name for path in Path(config.out).iterdir()] == ["thesis.tex"]


def test_caches_of_another_run_of_the_same_name_are_refused(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    source = f"fsdd:{digits}"
    first = run(tiny_speech(source))
    before = first.paths.cache(1).read_bytes()
    with pytest.raises(RunError, match="another run of the same name"):
        run(tiny_speech(source, out=str(tmp_path / "sub" / "run"), **{"training.seed": 5}))
    assert first.paths.cache(1).read_bytes() == before


def test_a_second_process_on_the_same_run_is_refused(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    with (
        exclusive(Path(config.out) / "lock", RunError("busy")),
        pytest.raises(RunError, match="Another process is running"),
    ):
        run(config)


def test_a_loss_that_is_not_a_number_stops_the_run(tiny_speech: Tiny, digits: Path) -> None:
    with pytest.raises(LayerwiseError, match=r"loss of stage 1 became (nan|inf).*lower --lr"):
        run(tiny_speech(f"fsdd:{digits}", **{"training.lr": 1e30}))


def test_a_configuration_survives_its_own_file(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}", **{"memory.gpu_mem": "1GB"})
    result = run(config)
    assert load(result.paths.config) == config
    assert np.isfinite([record.best_loss for record in result.state.stages]).all()

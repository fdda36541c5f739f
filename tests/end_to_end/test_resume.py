"""Starting again: after a signal, a kill, a changed option, a wish to retrain."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import layerwise.engines.run
from layerwise.config import Config, load, with_options
from layerwise.engines.run import RunResult, run
from layerwise.errors import CacheError, ConfigError, Interrupted, LayerwiseError, RunError
from layerwise.events import CachingProgress, Event, Message, StageStarted, StepDone
from layerwise.files import exclusive, json_lines
from layerwise.report.progress import LogFile
from layerwise.run_store import RunState, RunStore, StageRecord
from layerwise.stop import StopFlag
from layerwise.training.checkpoint import load_arrays, save_arrays
from layerwise.training.resume import find_what_is_missing
from layerwise.training.spec import StageSpec

Tiny = Callable[..., Config]
Finished = Callable[[Config], RunResult]


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
def undisturbed(tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished) -> dict[str, bytes]:
    """The bits of a run that nobody stopped."""
    return bits(finished(tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "undisturbed"))).paths.encoder)


@pytest.mark.parametrize(("kind", "number"), [(StepDone, 1), (StepDone, 13), (StepDone, 40), (CachingProgress, 20)])
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bits(
    tiny_speech: Tiny, digits: Path, undisturbed: dict[str, bytes], kind: type, number: int
) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    stop, notify = stop_at(kind, number)
    with pytest.raises(Interrupted, match="start the same command again"):
        run(config, stop=stop, notify=notify)
    assert bits(run(config).paths.encoder) == undisturbed


def test_probes_in_training_change_no_bits_and_are_the_same_after_a_stop(
    tiny_speech: Tiny, digits: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    found = []
    for number in (None, 13):
        config = tiny_speech(f"fsdd:{digits}", out=str(tmp_path / f"stop {number}"), **{"training.probe_every": 2})
        stop, notify = stop_at(StepDone, number or 10**6)
        with nullcontext() if number is None else pytest.raises(Interrupted):
            run(config, stop=stop, notify=notify)
        result = run(config)
        assert bits(result.paths.encoder) == undisturbed
        found.append([line.get("probe_error") for line in json_lines(result.paths.metrics(2))])
    assert found[0] == found[1]
    assert [error is not None for error in found[0]] == [epoch % 2 == 0 for epoch in range(1, len(found[0]) + 1)]
    assert all(0 <= error <= 1 for error in found[0] if error is not None)


@pytest.mark.parametrize(
    "changes",
    [{"training.schedule": "simultaneous"}, {"memory.optimizer": "host", "memory.micro_batch": 2}],
    ids=["all modules at once", "what waits on the host"],
)
def test_other_layouts_probe_in_training_too(tiny_speech: Tiny, digits: Path, changes: dict[str, object]) -> None:
    options = {"training.probe_every": 1, "training.max_epochs": 1, **changes}
    result = run(tiny_speech(f"fsdd:{digits}", **options))
    assert [0 <= line["probe_error"] <= 1 for line in json_lines(result.paths.metrics(1))] == [True]


def test_a_run_that_is_stopped_after_every_few_steps_ends_with_the_same_bits(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    warm = {"training.warmup_steps": 7}
    whole = bits(run(tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "whole"), **warm)).paths.encoder)
    assert whole != undisturbed
    config = tiny_speech(f"fsdd:{digits}", **warm)
    for _ in range(100):
        stop, notify = stop_at(StepDone, 3)
        try:
            result = run(config, stop=stop, notify=notify)
            break
        except Interrupted:
            continue
    assert bits(result.paths.encoder) == whole


@pytest.mark.parametrize("step", [9, 10])
def test_a_stage_that_was_resumed_records_the_device_peaks_of_one_that_was_not(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished, step: int
) -> None:
    """What is left of its last epoch, a small batch or the held-out samples alone, takes less than a whole one."""

    def peaks(result: RunResult) -> list[object]:
        of_stages = [(each.train_peak_bytes, each.train_peak_by_kind, each.peak_bytes) for each in result.state.stages]
        return [of_stages, json_lines(result.paths.metrics(1))[-1]["peak_bytes"]]

    undisturbed = finished(tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "undisturbed")))
    config = tiny_speech(f"fsdd:{digits}")
    stop, notify = stop_at(StepDone, step)
    with pytest.raises(Interrupted, match="stage 1, epoch 2"):
        run(config, stop=stop, notify=notify)
    assert peaks(run(config)) == peaks(undisturbed)


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
    assert rewritten[0].rows > 5000  # of 31524; the blocks before it were kept
    assert rewritten[-1].rows == rewritten[-1].total
    assert result.state.done


def test_a_finished_run_is_not_trained_again(tiny_speech: Tiny, digits: Path, finished: Finished) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    finished(config)
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
    tiny_speech: Tiny, digits: Path, key: str, value: object, message: str, finished: Finished
) -> None:
    source = f"fsdd:{digits}"
    result = finished(tiny_speech(source))
    before = bits(result.paths.encoder)
    with pytest.raises(ConfigError, match=message):
        run(tiny_speech(source, **{key: value}))
    assert bits(result.paths.encoder) == before
    assert run(tiny_speech(source)).state.done


def test_options_of_place_may_change(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    stop, notify = stop_at(StepDone, 7)
    stages = {"training.stages": 4}
    with pytest.raises(Interrupted):
        run(tiny_speech(f"fsdd:{digits}", **stages), stop=stop, notify=notify)
    (tmp_path / "elsewhere").symlink_to(digits)
    changed = {"memory.gpu_mem": "1GB", "training.checkpoint_seconds": 0, **stages}
    assert run(tiny_speech(f"fsdd:{tmp_path / 'elsewhere'}", **changed)).state.done


def test_from_stage_retrains_from_the_cache_below_and_keeps_the_rest(
    tiny_speech: Tiny, digits: Path, finished: Finished
) -> None:
    source = f"fsdd:{digits}"
    first = finished(tiny_speech(source))
    kept = first.paths.cache(2).read_bytes()
    before = bits(first.paths.encoder)
    retrained = run(tiny_speech(source, **{"training.lr": 0.01}), from_stage=3)
    after = bits(retrained.paths.encoder)
    assert retrained.paths.cache(2).read_bytes() == kept
    changed = {name.split(".")[1] for name in before if before[name] != after[name]}
    assert changed == {"2", "3"}  # layers count from 0
    again = run(tiny_speech(source), from_stage=3)
    assert bits(again.paths.encoder) == before


def test_from_stage_that_was_stopped_goes_on_and_does_not_begin_again(
    tiny_speech: Tiny, digits: Path, finished: Finished
) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    finished(config)
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


def test_a_cache_that_was_deleted_is_written_again_where_it_is_needed(
    tiny_speech: Tiny, digits: Path, finished: Finished
) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    first = finished(config)
    before, last = first.paths.cache(2).read_bytes(), first.paths.cache(4).read_bytes()
    for stage in (1, 2, 3):
        first.paths.cache(stage).unlink()
    events: list[Event] = []
    run(config, from_stage=4, notify=events.append)
    assert [event.stage for event in events if isinstance(event, StageStarted)] == [4]
    assert first.paths.cache(2).read_bytes() == before
    assert first.paths.cache(4).read_bytes() == last


@pytest.mark.parametrize("policy", ["auto", "never"])
def test_from_stage_with_another_dtype_leaves_what_the_stages_below_give(
    tiny_speech: Tiny, digits: Path, policy: str
) -> None:
    def config(dtype: str) -> Config:
        return tiny_speech(f"fsdd:{digits}", **{"cache.policy": policy, "cache.dtype": dtype})

    first = run(config("float32"))
    weights = bits(first.paths.weights(3))
    cache = first.paths.cache(2).read_bytes() if policy == "auto" else None
    for stage in (1, 2):
        first.paths.cache(stage).unlink(missing_ok=True)
    # What stage 3 trains on is worked out anew, and its training does not ask how its own outputs are stored.
    assert bits(run(config("bfloat16"), from_stage=3).paths.weights(3)) == weights
    assert cache is None or first.paths.cache(2).read_bytes() == cache


def test_a_from_stage_that_was_killed_before_it_deleted_anything_still_retrains(
    tiny_speech: Tiny, digits: Path, finished: Finished
) -> None:
    source = f"fsdd:{digits}"
    result = finished(tiny_speech(source))
    state = RunState.load(result.paths.state)
    state.from_stage, state.kept_stages = 3, 2
    state.stages[2:] = [StageRecord(3), StageRecord(4)]
    state.save(result.paths.state)
    changed = tiny_speech(source, **{"training.lr": 0.01})
    events: list[Event] = []
    run(changed, from_stage=3, notify=events.append)
    assert [event.stage for event in events if isinstance(event, StageStarted)] == [3, 4]


def test_a_from_stage_that_finds_no_room_for_the_encoder_trains_nothing_again(
    tiny_speech: Tiny, digits: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"fsdd:{digits}"
    finished(tiny_speech(source))
    changed = tiny_speech(source, **{"training.lr": 0.01})

    def no_room(*_: object) -> None:
        raise RunError("No room is left on the disk")

    with monkeypatch.context() as patch:
        patch.setattr("layerwise.training.encoder.save_arrays", no_room)
        with pytest.raises(RunError, match="No room"):
            run(changed, from_stage=3)
    events: list[Event] = []
    run(changed, from_stage=3, notify=events.append)
    assert [event.stage for event in events if isinstance(event, StageStarted)] == []


def test_overwrite_begins_anew_and_leaves_a_users_own_files(
    tiny_speech: Tiny, digits: Path, finished: Finished
) -> None:
    source = f"fsdd:{digits}"
    first = finished(tiny_speech(source))
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


def test_caches_of_another_run_of_the_same_name_are_refused(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished
) -> None:
    source = f"fsdd:{digits}"
    first = finished(tiny_speech(source))
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


def test_a_second_run_on_the_same_folder_of_caches_is_refused(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    with (
        exclusive(Path(config.cache.dir) / "run" / "lock", RunError("busy")),
        pytest.raises(RunError, match="Another run of the same name is using"),
    ):
        run(config)


def test_what_was_planned_for_a_run_that_has_gone_on_meanwhile_is_not_done(
    tiny_speech: Tiny, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"fsdd:{digits}"
    config = tiny_speech(source)
    stop, notify = stop_at(StepDone, 2)
    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=notify)
    plan = layerwise.engines.run.cut_network

    def plan_while_another_goes_on(*arguments: object) -> list[StageSpec]:
        monkeypatch.undo()
        run(config)
        return plan(*arguments)

    monkeypatch.setattr("layerwise.engines.run.cut_network", plan_while_another_goes_on)
    with pytest.raises(RunError, match=r"Another process has gone on with .* meanwhile"):
        run(tiny_speech(source, **{"cache.policy": "never"}))
    assert run(config).state.done


def test_a_loss_that_is_not_a_number_stops_the_run(tiny_speech: Tiny, digits: Path) -> None:
    with pytest.raises(LayerwiseError, match=r"loss of stage 1 became (nan|inf).*lower --lr"):
        run(tiny_speech(f"fsdd:{digits}", **{"training.lr": 1e30}))


def test_a_configuration_survives_its_own_file(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}", **{"memory.gpu_mem": "1GB", "training.stages": 4})
    result = run(config)
    measured = {"memory.flops_per_byte": result.state.config.memory.flops_per_byte}
    assert load(result.paths.config) == with_options(config, measured)
    assert np.isfinite([record.best_loss for record in result.state.stages]).all()


def test_from_stage_may_be_tried_again_with_another_value(tiny_speech: Tiny, digits: Path, finished: Finished) -> None:
    source = f"fsdd:{digits}"
    finished(tiny_speech(source))
    stop, notify = stop_at(StepDone, 7)
    with pytest.raises(Interrupted):
        run(tiny_speech(source, **{"training.lr": 0.01}), from_stage=3, stop=stop, notify=notify)
    events: list[Event] = []
    second = tiny_speech(source, **{"training.lr": 0.005})
    run(second, from_stage=3, notify=events.append)
    assert next(event for event in events if isinstance(event, StageStarted)) == StageStarted(3, epoch=0, step=0)
    # The finished run answers to the options of its newest stages; those below keep theirs.
    assert run(second).state.done
    with pytest.raises(ConfigError, match=r"--lr .* was 0.005 when stage 3"):
        run(tiny_speech(source))


def test_a_changed_number_of_stages_is_named_even_with_from_stage(tiny_speech: Tiny, digits: Path) -> None:
    source = f"fsdd:{digits}"
    run(tiny_speech(source, **{"training.stages": 2}))
    for from_stage in (None, 1):
        with pytest.raises(ConfigError, match=r"--stages .* was 2 .* is 3 now"):
            run(tiny_speech(source, **{"training.stages": 3}), from_stage=from_stage)


def test_a_changed_option_of_the_data_is_named(tiny_speech: Tiny, digits: Path, finished: Finished) -> None:
    source = f"fsdd:{digits}"
    finished(tiny_speech(source))
    with pytest.raises(ConfigError, match=r"data.sample_rate was 8000 .* is 16000 now"):
        run(tiny_speech(source, **{"data.sample_rate": 16000}))


def test_a_refused_overwrite_deletes_nothing(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished
) -> None:
    source = f"fsdd:{digits}"
    first = finished(tiny_speech(source))
    before = bits(first.paths.encoder)
    with pytest.raises(RunError, match="--from-stage 2"):
        run(tiny_speech(source), overwrite=True, from_stage=2)
    (tmp_path / "other" / "run").mkdir(parents=True)
    RunStore(tmp_path / "somebody", tmp_path / "other" / "run").write_caches_owner("0123456789abcdef")
    with pytest.raises(RunError, match="caches of another run"):
        run(tiny_speech(source, **{"cache.dir": str(tmp_path / "other")}), overwrite=True)
    assert bits(first.paths.encoder) == before
    assert first.paths.cache(4).exists()


def test_caches_that_nobody_claims_are_not_taken(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "run" / "stage-1.h5"
    cache.parent.mkdir(parents=True)
    cache.write_text("somebody's")
    with pytest.raises(RunError, match="caches of another run"):
        run(tiny_speech(f"fsdd:{digits}"))
    assert cache.read_text() == "somebody's"


def test_moved_caches_are_found_under_their_new_name(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    source = f"fsdd:{digits}"
    run(tiny_speech(source))
    (tmp_path / "cache").rename(tmp_path / "disk")
    result = run(tiny_speech(source, **{"cache.dir": str(tmp_path / "disk")}))
    assert result.paths.caches == tmp_path / "disk" / "run"
    assert all(record.cache and result.paths.cache(record.stage).exists() for record in result.state.stages)


def test_weights_that_were_deleted_are_trained_again_to_the_same_bits(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    first = run(config)
    before = bits(first.paths.encoder)
    first.paths.weights(2).unlink()
    events: list[Event] = []
    assert bits(run(config, notify=events.append).paths.encoder) == before
    assert [event.stage for event in events if isinstance(event, StageStarted)] == [2, 3, 4]
    assert Message("the weights of stage 2 are missing: it and those above it are trained again") in events


def flip_a_bit_of_the_last_array(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)


def test_damaged_weights_are_named_and_not_used(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    result = run(config)
    before = bits(result.paths.encoder)
    flip_a_bit_of_the_last_array(result.paths.weights(2))
    result.paths.cache(2).unlink()
    with pytest.raises(RunError, match=r"stages/2/weights.safetensors is damaged.*--from-stage 2"):
        run(config, from_stage=3)
    assert bits(run(config, from_stage=2).paths.encoder) == before


def test_a_damaged_checkpoint_is_named_and_not_used(
    tiny_speech: Tiny, digits: Path, undisturbed: dict[str, bytes]
) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    stop, notify = stop_at(StepDone, 13)
    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=notify)
    checkpoint = next(Path(config.out).glob("stages/*/checkpoint.safetensors"))
    whole = checkpoint.read_bytes()
    for place in (whole.index(b'"loss_sum') + 4, whole.index(b'"made_for') + 16, len(whole) - 3):
        content = bytearray(whole)
        content[place] ^= 1
        checkpoint.write_bytes(content)
        with pytest.raises(RunError, match=r"checkpoint.safetensors is damaged.*delete it and start the same command"):
            run(config)
    checkpoint.unlink()
    assert bits(run(config).paths.encoder) == undisturbed


def test_a_checkpoint_of_another_version_is_a_sentence(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    stop, notify = stop_at(StepDone, 2)
    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=notify)
    checkpoint = Path(config.out) / "stages" / "1" / "checkpoint.safetensors"
    arrays, metadata = load_arrays(checkpoint, "")
    save_arrays(checkpoint, arrays, metadata | {"progress": '{"epoch": 0, "mood": 1}'})
    with pytest.raises(RunError, match=r"checkpoint.safetensors was saved by another version of layerwise; delete it"):
        run(config)


def test_a_stage_whose_weights_are_gone_is_still_to_be_cached_as_decided(tmp_path: Path) -> None:
    store = RunStore.of(tmp_path / "run", tmp_path / "cache")
    records = [StageRecord(1, "done", cached=True), StageRecord(2, "done", cached=True), StageRecord(3, cached=False)]
    state = RunState(records, Config(), "data", None, "cpu", "../cache/run", 1, [1, 1, 1])
    for path in (store.weights(1), store.cache(1)):
        path.parent.mkdir(parents=True)
        path.touch()
    find_what_is_missing(state, store, "needed")
    assert [record.status for record in state.stages] == ["done", "pending", "pending"]
    assert [record.cached for record in state.stages] == [True, True, False]


def test_a_log_that_cannot_be_written_stops_nothing(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    Path(config.out).mkdir()
    log = LogFile(Path(config.out) / "log.txt")
    (Path(config.out) / "run.json").touch()
    (Path(config.out) / "log.txt").symlink_to("/dev/full")
    log.write("a line that finds no room")


@pytest.mark.gpu
def test_on_a_gpu_a_run_stays_under_its_budget(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}", **{"memory.gpu_mem": "1GB", "training.stages": 4, "training.device": "cuda"})
    state = run(config).state
    assert state.device == "cuda:0"
    assert all(0 < (record.peak_bytes or 0) < (record.driver_bytes or 0) < 10**9 for record in state.stages)


def test_a_cache_of_another_training_is_refused(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished
) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    ours = finished(config)
    theirs = finished(tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "theirs"), **{"training.seed": 1}))
    shutil.copy(theirs.paths.cache(2), ours.paths.cache(2))
    with pytest.raises(CacheError, match=r"stage-2\.h5 was not made by this run"):
        run(config)

"""Runs with little disk: what is kept, what is recomputed, and what is made again when it was damaged."""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from layerwise.config import Config
from layerwise.engines.run import RunResult, run
from layerwise.errors import BudgetError, Interrupted, RunError
from layerwise.evaluate.probe import probe
from layerwise.events import Event, Message, StepDone
from layerwise.run_store import RunState, RunStore
from layerwise.stop import StopFlag

Tiny = Callable[..., Config]
Finished = Callable[[Config], RunResult]
FLOAT32 = {"cache.dtype": "float32", "training.max_epochs": 1}


def cached(result: RunResult) -> list[int]:
    return [record.stage for record in result.state.stages if result.paths.cache(record.stage).exists()]


def weights(result: RunResult) -> np.ndarray:
    return np.concatenate([value.ravel() for _, value in sorted(load_file(result.paths.encoder).items())])


def at(config: Config, folder: Path, **changes: object) -> Config:
    """The same run elsewhere, with other cache options."""
    cache = config.cache.model_copy(update={"dir": str(folder / "cache"), **changes})
    return config.model_copy(update={"out": str(folder / "run"), "cache": cache})


@pytest.mark.parametrize(("keep", "kept"), [("needed", [3, 4]), ("all", [1, 2, 3, 4]), ("last", [4])])
def test_only_the_caches_that_are_asked_for_are_kept(
    tiny_speech: Tiny, digits: Path, keep: str, kept: list[int], finished: Finished
) -> None:
    result = finished(tiny_speech(f"fsdd:{digits}", **FLOAT32, **{"cache.keep": keep}))
    assert cached(result) == kept
    assert [record.stage for record in result.state.stages if record.cache] == kept
    assert sorted(result.paths.caches.glob("stage-*")) == [result.paths.cache(stage) for stage in kept]


@pytest.mark.parametrize("kind", ["speech", "vision"])
def test_without_caches_the_weights_are_the_same(
    tiny_speech: Tiny, tiny_vision: Tiny, digits: Path, tmp_path: Path, kind: str, finished: Finished
) -> None:
    if kind == "speech":
        config = tiny_speech(f"fsdd:{digits}", **FLOAT32)
    else:
        rng = np.random.default_rng(0)
        for number in range(16):
            (tmp_path / "pictures" / "noise").mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / "noise" / f"{number}.png")
        # A smaller crop begins at any pixel where it is recomputed from the pictures, and with a patch where it is cached.
        config = tiny_vision(f"images:{tmp_path / 'pictures'}", **FLOAT32, **{"data.crop": 32})
    with_caches = finished(config)
    without = run(at(config, tmp_path / "never", policy="never"))
    assert cached(without) == []
    assert [record.input for record in without.state.stages][1:] == ["recompute"] * (len(without.state.stages) - 1)
    first, second = weights(with_caches), weights(without)
    assert np.linalg.norm(first - second) < 1e-4 * np.linalg.norm(first)


def test_a_small_disk_caches_what_it_holds_and_never_passes_its_budget(tiny_speech: Tiny, digits: Path) -> None:
    budget = 600_000  # the upper stages, not the first
    largest = 0

    def watch(event: Event) -> None:
        nonlocal largest
        folder = Path(config.cache.dir) / "run"
        largest = max(largest, sum(path.stat().st_size for path in folder.glob("stage-*.h5*")))

    config = tiny_speech(f"fsdd:{digits}", **FLOAT32, **{"cache.keep": "needed", "cache.disk": budget})
    result = run(config, notify=watch)
    inputs = [record.input for record in result.state.stages]
    assert "recompute" in inputs
    assert "cache" in inputs
    assert 0 < largest <= budget


def test_a_stopped_run_without_caches_ends_with_the_same_bits(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished
) -> None:
    config = tiny_speech(f"fsdd:{digits}", **FLOAT32, **{"cache.policy": "never"})
    undisturbed = finished(config)
    stop, seen = StopFlag(), 0

    def notify(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StepDone) and event.stage == 3
        if seen == 2:
            stop.reason = "the test"

    again = at(config, tmp_path / "stopped")
    with pytest.raises(Interrupted):
        run(again, stop=stop, notify=notify)
    resumed = run(again)
    assert weights(resumed).tobytes() == weights(undisturbed).tobytes()


def test_what_is_cached_is_not_decided_anew_by_the_free_disk_of_the_moment(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_speech(f"fsdd:{digits}", **FLOAT32)
    # Another program takes most of the disk, or gives it back.
    for name, room in (("taken", iter([10**12, 600_000])), ("given back", iter([600_000, 10**12]))):
        again = at(config, tmp_path / name, keep="needed")
        stop = StopFlag()

        def stop_in_stage_1(event: Event, stop: StopFlag = stop) -> None:
            if isinstance(event, StepDone):
                stop.reason = "the test"

        monkeypatch.setattr("layerwise.engines.run.free_for_caches", lambda folder, room=room: next(room))
        with pytest.raises(Interrupted):
            run(again, stop=stop, notify=stop_in_stage_1)
        before = [record.cached for record in RunState.load(Path(again.out) / "run.json").stages]
        told: list[Event] = []
        after = run(again, notify=told.append)
        changed = [record.cached for record in after.state.stages] != before
        assert changed == (name == "taken")
        texts = [event.text for event in told if isinstance(event, Message)]
        assert any("an earlier start was to cache the outputs of stage 1" in text for text in texts) == changed


def test_a_disk_budget_that_is_given_later_counts_at_once(tiny_speech: Tiny, digits: Path) -> None:
    source = f"fsdd:{digits}"

    def stopped_in(stage: int, **options: object) -> None:
        stop = StopFlag()

        def notify(event: Event) -> None:
            if isinstance(event, StepDone) and event.stage == stage:
                stop.reason = "the test"

        with pytest.raises(Interrupted):
            run(tiny_speech(source, **FLOAT32, **options), stop=stop, notify=notify)

    stopped_in(1)
    stopped_in(2, **{"cache.disk": 600_000, "cache.keep": "needed"})
    store = RunStore.of(tiny_speech(source).out, tiny_speech(source).cache.dir)
    assert not list(store.caches.glob("stage-1*"))
    assert run(tiny_speech(source, **FLOAT32)).state.done
    with pytest.raises(BudgetError, match=r"--disk 1 kB does not hold"):
        run(tiny_speech(source, **FLOAT32, **{"cache.disk": 1000}))


def test_always_is_refused_before_anything_is_written_where_there_is_no_room(tiny_speech: Tiny, digits: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}", **FLOAT32, **{"cache.policy": "always", "cache.disk": 100_000})
    with pytest.raises(BudgetError, match=r"does not hold the cache of stage 1.*--cache auto"):
        run(config)
    assert not Path(config.out).exists()


def flip_a_bit(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("keep", ["all", "needed", "last"])
def test_a_cache_that_is_damaged_in_the_middle_of_a_run_is_named_and_made_again(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, keep: str, finished: Finished
) -> None:
    config = tiny_speech(f"fsdd:{digits}", **FLOAT32, **{"cache.keep": keep})
    undisturbed = finished(config)
    again = at(config, tmp_path / "damaged")
    stop, told = StopFlag(), []

    def stop_in_stage_3(event: Event) -> None:
        if isinstance(event, StepDone) and event.stage == 3:
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(again, stop=stop, notify=stop_in_stage_3)
    path = tmp_path / "damaged" / "cache" / "run" / "stage-2.h5"
    flip_a_bit(path, path.stat().st_size // 2)
    result = run(again, notify=lambda event: told.append(event.text) if isinstance(event, Message) else None)
    assert any("stage-2.h5" in text for text in told)
    assert weights(result).tobytes() == weights(undisturbed).tobytes()
    for stage in cached(undisturbed):
        assert result.paths.cache(stage).read_bytes() == undisturbed.paths.cache(stage).read_bytes()


def of_version_1(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["format_version"] = 1


UNUSABLE = {
    "a head of zeros": lambda path: path.write_bytes(bytes(8192) + path.read_bytes()[8192:]),
    "another version": of_version_1,
    "a text": lambda path: path.write_text("a text"),
    "a named pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


def test_whatever_cannot_be_used_in_the_place_of_a_cache_is_made_again(
    tiny_speech: Tiny, digits: Path, finished: Finished
) -> None:
    config = tiny_speech(f"fsdd:{digits}", **FLOAT32)
    result = finished(config)
    path = result.paths.cache(2)
    before = path.read_bytes()
    for name, spoil in UNUSABLE.items():
        spoil(path)
        assert run(config, from_stage=3 if name == "a text" else None).state.done
        assert path.read_bytes() == before, name
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match=r"stage-2.h5 is no file.*cannot be deleted: Is a directory"):
        run(config)


def test_a_probe_needs_no_caches(tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Finished) -> None:
    config = tiny_speech(f"fsdd:{digits}", **FLOAT32)
    finished(config)
    cached_errors = probe(Path(config.out), "digit", classifier="knn")  # whose answers a rounding does not change
    for path in (Path(config.cache.dir) / "run").glob("stage-[124].h5"):
        path.unlink()
    assert probe(Path(config.out), "digit", classifier="knn").stages == cached_errors.stages


def test_a_probe_names_a_damaged_cache_and_does_without(tiny_speech: Tiny, digits: Path, finished: Finished) -> None:
    config = tiny_speech(f"fsdd:{digits}", **FLOAT32)
    result = finished(config)
    whole = probe(Path(config.out), "digit", classifier="knn").stages
    flip_a_bit(result.paths.cache(2), result.paths.cache(2).stat().st_size // 2)
    told: list[object] = []
    assert probe(Path(config.out), "digit", classifier="knn", notify=told.append).stages == whole
    (warning,) = (each.text for each in told if isinstance(each, Message))
    assert "stage-2.h5 is damaged" in warning


@pytest.mark.parametrize("keep", ["needed", "all", "last"])
def test_a_finished_run_makes_the_caches_that_it_keeps_again(
    tiny_speech: Tiny, digits: Path, keep: str, finished: Finished
) -> None:
    config = tiny_speech(f"fsdd:{digits}", **FLOAT32, **{"cache.keep": keep})
    result = finished(config)
    before = {stage: result.paths.cache(stage).read_bytes() for stage in cached(result)}
    for damage in (Path.unlink, lambda path: flip_a_bit(path, path.stat().st_size - 3)):
        for stage in before:
            damage(result.paths.cache(stage))
        events: list[Event] = []
        assert run(config, notify=events.append).state.done
        assert {stage: result.paths.cache(stage).read_bytes() for stage in cached(result)} == before
        assert not any(isinstance(event, StepDone) for event in events)


def test_what_a_kill_has_left_of_caches_is_deleted_at_the_next_start(
    tiny_speech: Tiny, digits: Path, finished: Finished
) -> None:
    config = tiny_speech(f"fsdd:{digits}", **FLOAT32, **{"cache.keep": "needed"})
    result = finished(config)
    kept = {path: path.read_bytes() for path in result.paths.caches.iterdir()}
    for name in ("stage-1.h5", "stage-2.h5.part", "stage-2.h5.journal", "stage-4.h5.packing", "stage-9.h5"):
        (result.paths.caches / name).write_bytes(bytes(1000))
    (result.paths.caches / "stage-1.h5.mine").write_text("notes")
    run(config)
    (result.paths.caches / "stage-1.h5.mine").unlink()
    assert {path: path.read_bytes() for path in result.paths.caches.iterdir()} == kept

"""Restarts that get nowhere come to an end."""

import json
from pathlib import Path

import numpy as np
import pytest

from layerwise.engines.requeue import count_restart
from layerwise.errors import RunError
from layerwise.run_store import RunPaths, RunState, StageRecord
from layerwise.training.checkpoint import save_arrays


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run of two stages of which the first is trained."""
    paths = RunPaths.of(tmp_path / "run", tmp_path / "cache")
    records = [StageRecord(1, "done", epochs=2), StageRecord(2, "training")]
    RunState(records, "data", None, "cpu", str(paths.caches), [1, 1]).save(paths.state)
    save_checkpoint_of(paths, 0, 5)
    paths.caches.mkdir(parents=True)
    return paths


def save_checkpoint_of(paths: RunPaths, epoch: int, step: int) -> None:
    progress = json.dumps({"epoch": epoch, "step": step, "seconds": np.random.default_rng().random()})
    save_arrays(paths.checkpoint(2), {"weights": np.zeros(1)}, {"progress": progress})


def restart_in_vain(paths: RunPaths) -> None:
    """As many times as is still put up with."""
    for restarts in (0, 1, 2):
        count_restart(paths, restarts)


def test_three_starts_in_a_row_without_progress_are_the_last(paths: RunPaths) -> None:
    restart_in_vain(paths)
    with pytest.raises(RunError, match=r"started 3 times in a row .* not queued again; see log\.txt"):
        count_restart(paths, 3)


def test_a_person_may_submit_it_anew(paths: RunPaths) -> None:
    restart_in_vain(paths)
    restart_in_vain(paths)


@pytest.mark.parametrize("what", ["step", "epoch", "cache", "stage"])
def test_progress_of_any_kind_counts(paths: RunPaths, what: str) -> None:
    restart_in_vain(paths)
    if what == "step":
        save_checkpoint_of(paths, 0, 6)
    elif what == "epoch":
        save_checkpoint_of(paths, 1, 5)
    elif what == "cache":
        (paths.caches / "stage-2.h5.journal").write_bytes(b"16 bytes of rows")
    else:
        state = RunState.load(paths.state)
        state.record(2).status = "caching"
        state.save(paths.state)
    for restarts in (3, 4, 5):
        count_restart(paths, restarts)
    with pytest.raises(RunError, match="3 times"):
        count_restart(paths, 6)


def test_a_checkpoint_that_is_written_again_at_the_same_step_is_no_progress(paths: RunPaths) -> None:
    for restarts in (0, 1, 2):
        save_checkpoint_of(paths, 0, 5)
        count_restart(paths, restarts)
    save_checkpoint_of(paths, 0, 5)
    with pytest.raises(RunError):
        count_restart(paths, 3)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stands": 1, "in_vain": "many"}'])
def test_a_damaged_note_begins_the_count_anew(paths: RunPaths, content: str) -> None:
    restart_in_vain(paths)
    paths.restarts.write_text(content)
    count_restart(paths, 3)


def test_a_run_that_is_stopped_before_it_exists_is_not_started_for_ever(tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path / "run", tmp_path / "cache")
    restart_in_vain(paths)
    assert not paths.out.exists()
    with pytest.raises(RunError, match="3 times"):
        count_restart(paths, 3)

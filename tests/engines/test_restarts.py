"""Restarts that get nowhere come to an end."""

import json
from pathlib import Path

import numpy as np
import pytest

from layerwise.config import Config
from layerwise.engines.requeue import count_restart
from layerwise.errors import RunError
from layerwise.run_store import RunState, RunStore, StageRecord
from layerwise.training.checkpoint import save_arrays


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A run of two stages of which the first is trained."""
    store = RunStore.of(tmp_path / "run", tmp_path / "cache")
    records = [StageRecord(1, "done", epochs=2), StageRecord(2, "training")]
    RunState(records, Config(), "data", None, "cpu", "../cache/run", 1, [1, 1]).save(store.state)
    save_checkpoint_of(store, 0, 5)
    store.caches.mkdir(parents=True)
    return store


def save_checkpoint_of(store: RunStore, epoch: int, step: int) -> None:
    progress = json.dumps({"epoch": epoch, "step": step, "seconds": np.random.default_rng().random()})
    save_arrays(store.checkpoint(2), {"weights": np.zeros(1)}, {"progress": progress})


def restart_in_vain(store: RunStore) -> None:
    """As many times as is still put up with."""
    for restarts in (0, 1, 2):
        count_restart(store, restarts)


def test_three_starts_in_a_row_without_progress_are_the_last(store: RunStore) -> None:
    restart_in_vain(store)
    with pytest.raises(RunError, match=r"started 3 times in a row .* not queued again; see log\.txt"):
        count_restart(store, 3)


def test_a_person_may_submit_it_anew(store: RunStore) -> None:
    restart_in_vain(store)
    restart_in_vain(store)


@pytest.mark.parametrize("what", ["step", "epoch", "cache", "stage"])
def test_progress_of_any_kind_counts(store: RunStore, what: str) -> None:
    restart_in_vain(store)
    if what == "step":
        save_checkpoint_of(store, 0, 6)
    elif what == "epoch":
        save_checkpoint_of(store, 1, 5)
    elif what == "cache":
        (store.caches / "stage-2.h5.journal").write_bytes(b"16 bytes of rows")
    else:
        state = RunState.load(store.state)
        state.record(2).status = "caching"
        state.save(store.state)
    for restarts in (3, 4, 5):
        count_restart(store, restarts)
    with pytest.raises(RunError, match="3 times"):
        count_restart(store, 6)


def test_a_checkpoint_that_is_written_again_at_the_same_step_is_no_progress(store: RunStore) -> None:
    for restarts in (0, 1, 2):
        save_checkpoint_of(store, 0, 5)
        count_restart(store, restarts)
    save_checkpoint_of(store, 0, 5)
    with pytest.raises(RunError):
        count_restart(store, 3)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stands": 1, "in_vain": "many"}'])
def test_a_damaged_note_begins_the_count_anew(store: RunStore, content: str) -> None:
    restart_in_vain(store)
    store.restarts.write_text(content)
    count_restart(store, 3)


def test_a_run_that_is_stopped_before_it_exists_is_not_started_for_ever(tmp_path: Path) -> None:
    store = RunStore.of(tmp_path / "run", tmp_path / "cache")
    restart_in_vain(store)
    assert not store.out.exists()
    with pytest.raises(RunError, match="3 times"):
        count_restart(store, 3)

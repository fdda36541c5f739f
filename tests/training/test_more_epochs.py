"""What a stage that is asked for more epochs twice remembers of the first time."""

from pathlib import Path

import numpy as np
import pytest

from layerwise.config import resolve, with_options
from layerwise.run_store import EarlierTraining, RunState, RunStore, StageRecord
from layerwise.training.checkpoint import save_arrays
from layerwise.training.further import set_back

OLD, NEW = "a" * 64, "b" * 64


@pytest.mark.parametrize(("saved_for", "same_input"), [(OLD, False), (None, False), (NEW, True)])
def test_a_stage_killed_before_its_first_checkpoint_on_another_input_does_not_keep_the_losses_of_the_old_one(
    tmp_path: Path, saved_for: str | None, same_input: bool
) -> None:
    """Stage 1 has learnt more and converged; stage 2 was begun above it, and killed."""
    begun_with = resolve(overrides={"training.max_epochs": 4})
    store = RunStore(tmp_path / "run", tmp_path / "caches")
    if saved_for is not None:
        store.checkpoint(2).parent.mkdir(parents=True)
        save_arrays(store.checkpoint(2), {"any": np.zeros(1)}, {"made_for": saved_for})
    below = StageRecord(1, "done", epochs=3, converged=True, config=begun_with)
    earlier = EarlierTraining(epochs=2, checkpoint=OLD, weights=OLD, same_input=False)
    killed = StageRecord(2, "training", config=begun_with, earlier=earlier)
    state = RunState([below, killed], begun_with, "data", None, "cpu", "", 0, [1, 1])
    set_back(state, store, with_options(begun_with, {"training.max_epochs": 6}), None)
    assert state.stages[0] is below
    assert state.stages[1].earlier == EarlierTraining(2, saved_for, OLD, same_input)

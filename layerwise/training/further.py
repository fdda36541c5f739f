"""Which stages a start trains again, from their first weights, or further, from where they stand.

Where --max-epochs is raised, each stage that has not converged goes on from its last checkpoint. Those above it read another
input from then on, so they go on too, from their own weights, as they do in rounds.
"""

from collections.abc import Iterable
from dataclasses import replace

from layerwise.config import Config, Option, changed_options
from layerwise.run_store import EarlierTraining, RunState, RunStore, StageRecord
from layerwise.training.checkpoint import purpose_of
from layerwise.training.run import fingerprint

Change = tuple[Option, object, object]
"""An option, its old value and its new one."""


def set_back(state: RunState, store: RunStore, config: Config, from_stage: int | None) -> bool:
    """Sets back the stages that this start is to train again, or further; only the state is changed.

    Gives whether they are to be trained again, from their first weights.
    """
    if from_stage is not None and not is_in_hand(state, config, from_stage):
        # The stages below keep their options from now on.
        state.from_stage, state.kept_stages = from_stage, from_stage - 1
        changes = training_changes(state, config, range(from_stage, len(state.stages) + 1))
        if not changes or not all(is_more_epochs(change, config) for change in changes):
            state.reset_from(from_stage)
            return True
    further = False
    for record in state.stages[state.kept_stages :]:
        if record.config is None:  # not begun, or set back by an earlier start
            if record.earlier is not None:
                record.earlier = replace(record.earlier, same_input=record.earlier.same_input and not further)
                further = True
            continue
        raised = any(is_more_epochs(change, config) for change in training_changes(state, config, [record.stage]))
        if further or (raised and not (record.is_trained and record.converged)):
            state.train_further(record.stage, _earlier(record, store, same_input=not further))
            further = True
    return False


def _earlier(record: StageRecord, store: RunStore, same_input: bool) -> EarlierTraining | None:
    """What a stage that is begun has learnt; None where nothing of it is left."""
    saved_for, weights, epochs = purpose_of(store.checkpoint(record.stage)), record.weights, record.epochs
    if saved_for and record.is_trained and fingerprint(saved_for, str(weights)) != record.fingerprint:
        saved_for = None  # of another training than the one that has ended
    if earlier := record.earlier:  # it has been asked for more epochs before, and may not have ended
        if not weights and saved_for in (None, earlier.checkpoint):  # nothing was saved since: its losses are as old
            same_input = same_input and earlier.same_input
        weights, epochs = weights or earlier.weights, max(epochs, earlier.epochs)
    return EarlierTraining(epochs, saved_for, weights, same_input) if saved_for or weights else None


def is_more_epochs(change: Change, config: Config) -> bool:
    """Whether it asks for more epochs of stages that go on from where they stand.

    Rounds share them out, once and for all, and a cosine has brought the learning rate to 0 at their end.
    """
    option, old, new = change
    fixed = config.training.rounds > 1 or config.training.cosine
    return option.key == "training.max_epochs" and int(str(new)) > int(str(old)) and not fixed


def further_trained(state: RunState) -> list[str]:
    """A line for each stage that is about to go on from what it has learnt, and one on what is gone with it."""
    lines = [
        f"stage {record.stage} goes on from where it stood, in epoch {record.earlier.epochs + 1}"
        for record in state.stages
        if record.status == "pending" and record.earlier
    ]
    return [*lines, "probes of before are deleted with the old encoder; probe again at the end"] if lines else []


def left_out(state: RunState, config: Config) -> list[str]:
    """A line where stages could be trained further, but stay as they are because --from-stage has left them so."""
    kept = [record for record in state.stages[: state.kept_stages] if not record.converged]
    if not any(
        is_more_epochs(change, config) for each in kept for change in training_changes(state, config, [each.stage])
    ):
        return []
    return [
        f"the stages below {state.kept_stages + 1} stay as they are, for --from-stage {state.kept_stages + 1} has left them "
        "out; with --from-stage 1 they are trained further, too"
    ]


def is_in_hand(state: RunState, config: Config, from_stage: int) -> bool:
    """Whether an earlier start was asked the same and did not end, so that this one goes on."""
    stages = range(from_stage, len(state.stages) + 1)
    return state.from_stage == from_stage and not training_changes(state, config, stages)


def training_changes(state: RunState, config: Config, stages: Iterable[int]) -> list[Change]:
    return [
        change
        for stage in stages
        if (trained_with := state.record(stage).config)
        for change in changed_options(trained_with, config, {"training"})
    ]

"""What a start finds on the disk: a new run, or one to go on with, or one that does not fit what is asked now.

A stage that is done or begun keeps the options it was trained with. Where they differ from those of this start, the
start is refused and the option is named: silently mixing two configurations would be worse than any error.

Every check comes before the first change. Whatever is changed, run.json says so first: a start after a kill between two
steps then finds nothing that it would wrongly believe in. First weights alone are written before it, for it names them.
"""

import itertools
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.config import Config, changed_options
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError, RunError
from layerwise.run_store import RunState, RunStore, StageRecord, cache_files
from layerwise.training.cache_plan import CachePlan, retained_caches
from layerwise.training.checkpoint import Arrays, digest, load_stages
from layerwise.training.first_weights import (
    check_warm_start,
    is_network_of,
    keep_first_weights,
    restore_first_weights,
)
from layerwise.training.further import Change, is_in_hand, is_more_epochs, set_back, training_changes
from layerwise.training.run import Run
from layerwise.training.samples import learnt_classes


@dataclass(frozen=True, slots=True)
class StartRequest:
    """What a start asks of a run that may be there already."""

    from_stage: int | None = None
    """Retrain this stage and those above it, or train them further: see `training.further`; None to go on."""
    overwrite: bool = False
    """Delete the run and begin anew."""

    def goes_on(self, store: RunStore) -> bool:
        """Whether there is a run to go on with."""
        return not self.overwrite and store.exists

    def check(self, store: RunStore, stages: int) -> None:
        """Raises ConfigError or RunError where a run of so many stages has no such stage, or none below it to go on from."""
        stage = self.from_stage
        if stage is not None and not 1 <= stage <= stages:
            raise ConfigError(f"--from-stage {stage}: this run has stages 1 to {stages}.")
        if stage not in (None, 1) and (self.overwrite or not store.exists):
            raise RunError(f"--from-stage {stage}: {store.out} would begin anew and has no stage below; leave it out.")


def prepare_rounds(run: Run, request: StartRequest, first: Arrays | None) -> dict[int, RunState]:
    """States of the rounds that there is still something to do in, by number; of the last one in any case.

    first: what a new run begins with, where the seed does not say it. run.json and config.toml of each are written. Raises
    RunError or ConfigError; what one round refuses is refused before the first is changed.
    """
    rounds, states = run.rounds, {}
    for number in _to_be_prepared(run, request):
        of_round = run.store.round(number, rounds)
        if request.goes_on(of_round):
            state = of_round.load_state()
            _check_going_on(state, of_round, run, request.from_stage)
            _check_weights(state, of_round, request.from_stage)
            if number == rounds:
                restore_first_weights(state, run)
    for number in range(rounds, 0, -1):
        of_round = run.store.round(number, rounds)
        if number < rounds and not of_round.exists:
            # Its folder was deleted, and nothing says any more what its caches are. They are this run's, as those of the last
            # round are, which is prepared by now.
            of_round.delete_cache_files(cache_files(of_round.caches))
            of_round.delete_caches_owner()
        states[number] = _prepare(of_round, run, request, run.keep(number), first)
        if number < rounds:
            _find_lost_ends(number, run, states)
        if number == rounds and states[number].is_trained:
            break  # what came before has served its purpose, and may have been deleted
    return dict(sorted(states.items()))


def _to_be_prepared(run: Run, request: StartRequest) -> list[int]:
    """The last round; and those before it, unless it is trained and is to stay so."""
    stays_trained = request.goes_on(run.store) and request.from_stage is None and run.store.load_state().is_trained
    return [run.rounds] if stays_trained else list(range(run.rounds, 0, -1))


def _find_lost_ends(number: int, run: Run, states: dict[int, RunState]) -> None:
    """Where the next round cannot begin for want of what this one ended with, this one trains the stage again."""
    here, above = run.store.round(number, run.rounds), run.store.round(number + 1, run.rounds)
    for record, following in zip(states[number].stages, states[number + 1].stages, strict=True):
        to_begin = not following.is_trained and not above.checkpoint(record.stage).exists()
        if record.is_trained and to_begin and not here.checkpoint(record.stage).exists():
            for later in range(number, run.rounds + 1):
                of_round = run.store.round(later, run.rounds)
                states[later].reset_from(record.stage)
                of_round.save_state(states[later])
                of_round.delete_pending_stages(states[later])
            return


def _prepare(store: RunStore, run: Run, request: StartRequest, keep: str, first: Arrays | None) -> RunState:
    """The state of a round to go on from; its run.json and config.toml are written. Raises RunError or ConfigError.

    store: of the round; keep: which caches stay at the end, see `CachePlan.kept`; first: see `prepare_rounds`.
    """
    old = store.load_state() if store.exists else None
    if old is not None and request.goes_on(store):
        _check_going_on(old, store, run, request.from_stage)
        state = old
        _go_on(state, store, run, request.from_stage, keep)
    else:
        store.refuse_foreign_caches(old)
        state = _new_state(store, run)
        if old is not None:
            store.delete_run(old)
        if store is run.store:
            state.first_weights = None if first is None else digest(first)
            keep_first_weights(store, first)
    state.takes, state.optimization = run.data.takes, _optimization(run)
    state.config, state.budget_bytes, state.device = run.config, run.config.memory.gpu_mem, str(run.device)
    state.classes = learnt_classes(run.config, run.data)
    state.caches = os.path.relpath(store.caches, store.out.resolve())
    if store.is_copy(state):
        state.copy_of, state.run_id = state.run_id, secrets.token_hex(8)
    state.inode = store.inode
    store.save_state(state)
    store.delete_pending_stages(state)
    store.write_caches_owner(state.run_id)
    store.write_config(run.config)
    return state


def _new_state(store: RunStore, run: Run) -> RunState:
    cached = zip(run.specs, run.cache_plan.cached, strict=True)
    return RunState(
        stages=[StageRecord(spec.stage, cached=to_be) for spec, to_be in cached],
        config=run.config,
        data_identity=run.data.identity,
        budget_bytes=None,
        device=str(run.device),
        caches="",
        inode=store.inode,
        cut=[len(spec.layers) for spec in run.specs],
        network=run.specs[0].network.identity,
        structure=run.specs[0].network.structure,
    )


def _go_on(state: RunState, store: RunStore, run: Run, from_stage: int | None, keep: str) -> None:
    """Makes the state what this start goes on from."""
    set_back(state, store, run.config, from_stage)
    for record, to_be in zip(state.stages, run.cache_plan.cached, strict=True):
        if not record.is_trained:
            record.cached = to_be
    find_what_is_missing(state, store, keep)


def _check_going_on(state: RunState, store: RunStore, run: Run, from_stage: int | None) -> None:
    """Raises ConfigError or RunError where a round of this state cannot be gone on with as asked; nothing is changed."""
    recorded = store.recorded_caches(state)
    if recorded and recorded != store.caches:
        raise ConfigError(
            f"--cache-dir: the caches of {store.out} lie in {recorded}, not in {store.caches}. Give the old place, or "
            "move the folder there first."
        )
    store.refuse_foreign_caches(state)
    _check_shape(state, store, run.config)
    _check_same_objects(state, store, run)
    if from_stage is None or is_in_hand(state, run.config, from_stage):
        _check_training(state, store, run.config)
        return
    unfinished = [record.stage for record in state.stages[: from_stage - 1] if record.status != "done"]
    if unfinished:
        raise RunError(f"--from-stage {from_stage}: stage {unfinished[0]} is not done yet; leave --from-stage out.")


def _check_weights(state: RunState, store: RunStore, from_stage: int | None) -> None:
    """Raises RunError where weights that are kept are not this run's: before days are spent on what stands above them."""
    for record in state.stages if from_stage is None else state.stages[: from_stage - 1]:
        if record.is_trained and store.weights(record.stage).exists():
            load_stages(store, [record])


def _check_shape(state: RunState, store: RunStore, config: Config) -> None:
    """Raises ConfigError where an option that shapes all stages differs from the run's."""
    changes = [
        change
        for change in changed_options(state.config, config, {"shape"})
        # The number of stages that a run has chosen by itself may be said, and left out again.
        if not (change[0].key == "training.stages" and {change[1], change[2]} <= {None, len(state.stages)})
    ]
    if changes:
        raise ConfigError(
            f"{listed_changes(changes, f'when {store.out} was started')}. Give the old back, or start anew with --overwrite or "
            "another --out."
        )


def _check_same_objects(state: RunState, store: RunStore, run: Run) -> None:
    """Raises RunError where the data set, the label learnt, the network or the optimizer is not the run's."""
    if state.data_identity != run.data.identity:
        before, now = state.config.data.source, run.config.data.source
        if before != now:
            raise RunError(
                f"The data set {now} is not the one that {store.out} was trained on, which was {before}; give that one, or "
                "another --out."
            )
        raise RunError(
            f"The data set is not the one that {store.out} was trained on: files or their sizes have changed. Bring the "
            f"old ones back, or begin with what it has learnt on those that are there now: another --out, and --warm-start "
            f"{store.out}."
        )
    refuse_other_classes(state, run.config, run.data)
    if not is_network_of(state, run.store, run.specs[0].network):
        raise RunError(
            f"The network is not the one that {store.out} was begun with; give that one, or start anew with --overwrite or "
            "another --out."
        )
    if store is run.store:
        check_warm_start(state, run)
    if not _is_same_optimization(state.optimization, _optimization(run)):
        raise RunError(
            f"The optimizer or its schedule is not the one that {store.out} was begun with; give that one, or start anew with "
            "--overwrite or another --out."
        )


def refuse_other_classes(state: RunState, config: Config, data: DataSet) -> None:
    """Raises RunError where the label that is learnt has other values than when the run was begun."""
    classes, label = learnt_classes(config, data), config.objective.label
    if state.classes and label == state.config.objective.label and state.classes != classes:
        raise RunError(
            f"The label {label!r} has other values than when the run was begun: --labels {config.data.labels} "
            "has changed, or is another file. Bring the old one back, or start anew with --overwrite or another --out."
        )


def _is_same_optimization(old: str, new: str) -> bool:
    """Also where a schedule goes on for more epochs: the list of what it does in each of them has become longer."""
    return old == new or (old.endswith("]]") and new.startswith(f"{old[:-1]}, "))


def _optimization(run: Run) -> str:
    own = run.specs[0].optimization
    return own.identity if own else ""


def _check_training(state: RunState, store: RunStore, config: Config) -> None:
    """Raises ConfigError where a begun stage was trained with other options, unless an earlier start kept it so."""
    for stage in range(state.kept_stages + 1, len(state.stages) + 1):
        changes = [change for change in training_changes(state, config, [stage]) if not is_more_epochs(change, config)]
        if changes:
            raise ConfigError(
                f"{listed_changes(changes, f'when stage {stage} of {store.out} was trained')}. Give the old back, or retrain "
                f"with --from-stage {stage}."
            )


def listed_changes(changes: list[Change], when: str) -> str:
    """Every change: name, old value, new value."""
    named = [
        f"{f'{option.flag} ({option.key})' if option.flag else option.key} was {_shown(old)} {when} and is {_shown(new)} now"
        for option, old, new in changes
    ]
    return "; ".join(named)


def _shown(value: object) -> str:
    return "not given" if value is None else str(value)


def earlier_records(store: RunStore, config: Config, request: StartRequest) -> list[StageRecord]:
    """What run.json says of the stages that this start keeps or goes on with, from stage 1 on."""
    if not request.goes_on(store):
        return []
    state = store.load_state()
    again = set_back(state, store, config, request.from_stage)
    return state.stages[: state.kept_stages] if again else state.stages


def decided(records: Sequence[StageRecord]) -> list[bool]:
    """For the first stages, those that are trained: whether their outputs are cached. Stages above were fed accordingly."""
    return [bool(record.cached) for record in itertools.takewhile(lambda record: record.is_trained, records)]


def intended(records: Sequence[StageRecord], store: RunStore, config: Config) -> list[bool | None]:
    """For each stage, what an earlier start with the same options of the caches meant to do with its outputs."""
    same_options = bool(records) and store.load_state().config.cache == config.cache
    return [record.cached for record in records] if same_options else []


def missing_weights(state: RunState, store: RunStore) -> list[str]:
    """A line for each stage that is trained and to be trained again, since its weights were deleted."""
    missing = [each.stage for each in state.stages if each.is_trained and not store.weights(each.stage).exists()]
    return [f"the weights of stage {stage} are missing: it and those above it are trained again" for stage in missing]


def find_what_is_missing(state: RunState, store: RunStore, keep: str) -> None:
    """Where weights were deleted, the stage and those above it are trained again: on a GPU it may not end with the same bits.

    Caches that were deleted are written again from the weights, where a stage above still needs them, or the run is
    finished and keeps them. Only the state is changed.
    """
    kept = retained_caches(state, keep) if state.is_trained else set()
    plan = CachePlan.of(state.stages)
    for record in reversed(state.stages):
        inputs = {plan.source(above.stage) for above in state.stages if above.status != "done"}
        needed = record.stage in kept | inputs
        if record.is_trained and not store.weights(record.stage).exists():
            state.reset_from(record.stage)
        elif needed and record.status == "done" and not store.cache(record.stage).exists():
            record.status = "caching"

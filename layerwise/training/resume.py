"""What a start finds on the disk: a new run, or one to go on with, or one that does not fit what is asked now.

A stage that is done or begun keeps the options it was trained with. Where they differ from those of this start, the
start is refused and the option is named: silently mixing two configurations would be worse than any error.

Every check comes before the first change. Whatever is changed, run.json says so first: a start after a kill between two
steps then finds nothing that it would wrongly believe in.
"""

import contextlib
import itertools
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from layerwise.cache.inventory import all_unsealed
from layerwise.config import Config, Option, changed_options, load
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError, RunError
from layerwise.files import write_atomically
from layerwise.run_store import RunState, RunStore, StageRecord
from layerwise.training.cache_plan import retained_caches
from layerwise.training.spec import StageSpec


def prepare(
    config: Config,
    store: RunStore,
    data: DataSet,
    specs: list[StageSpec],
    device: torch.device,
    *,
    from_stage: int | None,
    overwrite: bool,
    cached: Sequence[bool],
    keep: str,
) -> RunState:
    """The state to go on from; run.json and config.toml are written. Raises RunError or ConfigError.

    cached: for each stage, whether its outputs are to be cached; keep: which caches stay at the end, see `CachePlan.kept`.
    """
    old = RunState.load(store.state) if store.state.exists() else None
    # Killed before its options were written, a run has nothing to go on with.
    if old is None or overwrite or not store.config.exists():
        state = _begin(config, store, data, specs, device, old)
    else:
        state = _go_on(old, config, store, data, specs, from_stage, cached, keep)
    _assign(state, cached)
    state.budget_bytes, state.device = config.memory.gpu_mem, str(device)
    state.save(store.state)
    write_atomically(store.cache_owner, state.run_id.encode())
    write_atomically(store.config, config.to_toml().encode())
    return state


def check_from_stage(store: RunStore, from_stage: int | None, overwrite: bool, stages: int) -> None:
    """Raises ConfigError or RunError where a run of so many stages has none such, or none below it to go on from."""
    if from_stage is not None and not 1 <= from_stage <= stages:
        raise ConfigError(f"--from-stage {from_stage}: this run has stages 1 to {stages}.")
    if from_stage not in (None, 1) and (overwrite or not store.state.exists()):
        raise RunError(f"--from-stage {from_stage}: {store.out} would begin anew and has no stage below; leave it out.")


def _begin(
    config: Config, store: RunStore, data: DataSet, specs: list[StageSpec], device: torch.device, old: RunState | None
) -> RunState:
    """A new run, in place of the old one where there is one."""
    _check_cache_owner(store, old)
    if old is not None:
        _delete_run(store, old)
    records = [StageRecord(spec.stage) for spec in specs]
    cut = [len(spec.layers) for spec in specs]
    return RunState(
        records,
        data.identity,
        config.memory.gpu_mem,
        str(device),
        str(store.caches),
        cut,
        network=specs[0].network.identity,
        optimization=_optimization(specs),
    )


def _go_on(
    state: RunState,
    config: Config,
    store: RunStore,
    data: DataSet,
    specs: list[StageSpec],
    from_stage: int | None,
    cached: Sequence[bool],
    keep: str,
) -> RunState:
    check_going_on(state, config, store, data, specs, from_stage)
    if from_stage is not None and not _is_in_hand(state, store, config, from_stage):
        _reset_from(state, store, from_stage)
    if Path(state.caches) != store.caches:
        state.caches = str(store.caches)
        for record in state.stages:
            record.cache = str(store.cache(record.stage)) if record.cache else None
    _assign(state, cached)
    find_what_is_missing(state, store, keep)
    state.save(store.state)
    delete_pending(state, store)
    return state


def check_going_on(
    state: RunState,
    config: Config,
    store: RunStore,
    data: DataSet,
    specs: list[StageSpec],
    from_stage: int | None,
) -> None:
    """Raises ConfigError or RunError where a run of this state cannot be gone on with as asked; nothing is changed."""
    if Path(state.caches) != store.caches and Path(state.caches).exists():
        raise ConfigError(
            f"--cache-dir: the caches of {store.out} lie in {state.caches}, not in {store.caches}. Give the old place, or "
            "move the folder there first."
        )
    _check_cache_owner(store, state)
    _check_shape(state, store, config)
    _check_same_data(state, data, store)
    if state.network != specs[0].network.identity:
        raise RunError(
            f"The network is not the one that {store.out} was begun with, its first weights included; give that one (seed "
            "torch before it is made), or start anew with --overwrite or another --out."
        )
    if state.optimization != _optimization(specs):
        raise RunError(
            f"The optimizer or its schedule is not the one that {store.out} was begun with; give that one, or start anew with "
            "--overwrite or another --out."
        )
    if from_stage is None or _is_in_hand(state, store, config, from_stage):
        _check_training(state, store, config)
        return
    unfinished = [record.stage for record in state.stages[: from_stage - 1] if record.status != "done"]
    if unfinished:
        raise RunError(f"--from-stage {from_stage}: stage {unfinished[0]} is not done yet; leave --from-stage out.")


def _optimization(specs: list[StageSpec]) -> str:
    own = specs[0].optimization
    return own.identity if own else ""


def delete_pending(state: RunState, store: RunStore) -> None:
    """Of stages that are not begun: a stage leaves "pending" before it writes its first file, so these are left over."""
    for record in state.stages:
        if record.status == "pending":
            _delete_stage(store, record.stage)


def reset_above(state: RunState, stage: int) -> None:
    """Sets this stage and those above it back to the beginning, in the state alone."""
    state.stages[stage - 1 :] = [StageRecord(each.stage, cached=each.cached) for each in state.stages[stage - 1 :]]


def _check_cache_owner(store: RunStore, state: RunState | None) -> None:
    """Raises RunError where the folder for the caches holds another run's; `state` is None for a new run."""
    if store.cache_owner.exists():
        foreign = state is None or store.cache_owner.read_text() != state.run_id
    else:
        foreign = state is None and any(store.caches.glob("stage-*.h5*"))
    if foreign:
        raise RunError(
            f"{store.caches} holds caches of another run of the same name; give another --out name or --cache-dir, or "
            "delete that folder if its run is gone."
        )


def _check_shape(state: RunState, store: RunStore, config: Config) -> None:
    """Raises ConfigError where an option that shapes all stages differs from the run's."""
    changes = [
        change
        for change in changed_options(load(store.config), config, {"shape"})
        # The number of stages that a run has chosen by itself may be said, and left out again.
        if not (change[0].key == "training.stages" and {change[1], change[2]} <= {None, len(state.stages)})
    ]
    if changes:
        raise ConfigError(
            f"{listed_changes(changes, f'when {store.out} was started')}. Give the old back, or start anew with --overwrite or "
            "another --out."
        )


def _check_training(state: RunState, store: RunStore, config: Config) -> None:
    """Raises ConfigError where a begun stage was trained with other options, unless an earlier start kept it so."""
    for stage in range(state.kept_stages + 1, len(state.stages) + 1):
        changes = _training_changes(state, store, config, [stage])
        if changes:
            raise ConfigError(
                f"{listed_changes(changes, f'when stage {stage} of {store.out} was trained')}. Give the old back, or retrain "
                f"with --from-stage {stage}."
            )


def _check_same_data(state: RunState, data: DataSet, store: RunStore) -> None:
    if state.data_identity != data.identity:
        raise RunError(
            f"The data set is not the one that {store.out} was trained on: files or their sizes have changed. Bring the "
            "old ones back, or start anew with --overwrite or another --out."
        )


def _is_in_hand(state: RunState, store: RunStore, config: Config, from_stage: int) -> bool:
    """Whether an earlier start was asked the same and did not end, so that this one goes on."""
    stages = range(from_stage, len(state.stages) + 1)
    return state.from_stage == from_stage and not _training_changes(state, store, config, stages)


def _reset_from(state: RunState, store: RunStore, from_stage: int) -> None:
    """Sets this stage and those above it back to the beginning; those below keep their options from now on."""
    state.from_stage, state.kept_stages = from_stage, from_stage - 1
    state.stages[from_stage - 1 :] = [StageRecord(record.stage) for record in state.stages[from_stage - 1 :]]


def earlier_records(store: RunStore, config: Config, overwrite: bool, from_stage: int | None) -> list[StageRecord]:
    """What run.json says of the stages that this start keeps or goes on with, from stage 1 on."""
    if overwrite or not store.state.exists() or not store.config.exists():
        return []
    state = RunState.load(store.state)
    if from_stage is None or _is_in_hand(state, store, config, from_stage):
        return state.stages
    return state.stages[: from_stage - 1]


def decided(records: Sequence[StageRecord]) -> list[bool]:
    """For the first stages, those that are trained: whether their outputs are cached. Stages above were fed accordingly."""
    return [bool(record.cached) for record in itertools.takewhile(is_trained, records)]


def intended(records: Sequence[StageRecord], store: RunStore, config: Config) -> list[bool | None]:
    """For each stage, what an earlier start with the same options of the caches meant to do with its outputs."""
    asked_the_same = bool(records) and load(store.config).cache == config.cache
    return [record.cached for record in records] if asked_the_same else []


def _assign(state: RunState, cached: Sequence[bool]) -> None:
    """Says of every stage that is not trained whether its outputs are to be cached."""
    for record, to_be in zip(state.stages, cached, strict=True):
        if not is_trained(record):
            record.cached = to_be


def is_trained(record: StageRecord) -> bool:
    """Whether its weights are final, its outputs cached or not."""
    return record.status in ("caching", "done")


def find_what_is_missing(state: RunState, store: RunStore, keep: str) -> None:
    """Where weights were deleted, the stage and those above it are trained again: on a GPU it may not end with the same bits.

    Caches that were deleted are written again from the weights, where a stage above still needs them, or the run is
    finished and keeps them.
    """
    all_trained = all(is_trained(record) for record in state.stages)
    kept = retained_caches(state, keep) if all_trained else set()
    for record in reversed(state.stages):
        inputs = {state.source(above.stage) for above in state.stages if above.status != "done"}
        needed = record.stage in kept | inputs
        if record.status in ("caching", "done") and not store.weights(record.stage).exists():
            reset_above(state, record.stage)
        elif needed and record.status == "done" and not store.cache(record.stage).exists():
            record.status = "caching"


def _training_changes(
    state: RunState, store: RunStore, config: Config, stages: Iterable[int]
) -> list[tuple[Option, object, object]]:
    return [
        change
        for stage in stages
        if state.record(stage).status != "pending" and store.stage_config(stage).exists()
        for change in changed_options(load(store.stage_config(stage)), config, {"training"})
    ]


def listed_changes(changes: list[tuple[Option, object, object]], when: str) -> str:
    """Every change: name, old value, new value."""
    named = [
        f"{f'{option.flag} ({option.key})' if option.flag else option.key} was {_shown(old)} {when} and is {_shown(new)} now"
        for option, old, new in changes
    ]
    return "; ".join(named)


def _shown(value: object) -> str:
    return "not given" if value is None else str(value)


def _delete_stage(store: RunStore, stage: int) -> None:
    cache = store.cache(stage)
    for path in (store.encoder, cache, *all_unsealed(cache)):
        path.unlink(missing_ok=True)
    for folder in (store.stage(stage), store.probes):
        shutil.rmtree(folder, ignore_errors=True)


def _delete_run(store: RunStore, state: RunState) -> None:
    """Deletes what a run writes, and nothing else: a user's own notes in the folder stay. run.json stays to the end."""
    state.stages = [StageRecord(record.stage) for record in state.stages]
    state.save(store.state)
    old = RunStore(store.out, Path(state.caches))
    if old.cache_owner.exists() and old.cache_owner.read_text() == state.run_id:
        for record in state.stages:
            _delete_stage(old, record.stage)
        old.cache_owner.unlink()
    for folder in (old.out / "stages", old.probes, old.plots):
        shutil.rmtree(folder, ignore_errors=True)
    for path in (old.encoder, old.config, old.log, old.machine, old.report):
        path.unlink(missing_ok=True)
    for folder in (old.out / "rounds").glob("*"):
        with contextlib.suppress(RunError):  # nothing readable is in it
            earlier = RunState.load(folder / "run.json")
            _delete_run(RunStore(folder, Path(earlier.caches)), earlier)
    for entry in (old.out / "rounds").glob("*/*"):
        if entry != RunStore(entry.parent, old.caches).task_lock:  # whoever waits for it must meet the next to hold it
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

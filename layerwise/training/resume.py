"""What a start finds on the disk: a new run, or one to go on with, or one that does not fit what is asked now.

A stage that is done or begun keeps the options it was trained with. Where they differ from those of this start, the
start is refused and the option is named: silently mixing two configurations would be worse than any error.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from layerwise.config import Config, Option, changed_options, load
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError, RunError
from layerwise.files import write_atomically
from layerwise.run_directory import RunPaths, RunState, StageRecord
from layerwise.training.plan import StagePlan


def prepare(
    config: Config,
    paths: RunPaths,
    data: DataSet,
    plans: list[StagePlan],
    device: torch.device,
    *,
    from_stage: int | None,
    overwrite: bool,
) -> RunState:
    """The state to go on from; run.json and config.toml are written. Raises RunError or ConfigError."""
    if from_stage is not None and not 1 <= from_stage <= len(plans):
        raise ConfigError(f"--from-stage {from_stage}: this run has stages 1 to {len(plans)}.")
    if overwrite and paths.state.exists():
        _delete_run(paths)
    if paths.state.exists():
        state = RunState.load(paths.state)
        paths = RunPaths(paths.out, paths.caches)
        _check_same_data(state, data, paths)
        _check_same_cache_folder(state, paths)
        _begin_from_stage(state, paths, config, from_stage)
        _check_same_options(state, paths, config)
    else:
        if from_stage not in (None, 1):
            raise RunError(
                f"--from-stage {from_stage}: {paths.out} holds no run yet; leave --from-stage out to start one."
            )
        records = [StageRecord(plan.stage) for plan in plans]
        state = RunState(records, data.identity, config.memory.gpu_mem, str(device), str(paths.caches))
        _claim_caches(state, paths)
    state.budget_bytes, state.device = config.memory.gpu_mem, str(device)
    write_atomically(paths.config, config.to_toml().encode())
    state.save(paths.state)
    return state


def _check_same_data(state: RunState, data: DataSet, paths: RunPaths) -> None:
    if state.data_identity != data.identity:
        raise RunError(
            f"The data set is not the one that {paths.out} was trained on: files, their sizes or the options under "
            "[data] have changed. Bring the old ones back, or start anew with --overwrite or another --out."
        )


def _check_same_cache_folder(state: RunState, paths: RunPaths) -> None:
    if Path(state.caches) != paths.caches and Path(state.caches).exists():
        raise ConfigError(
            f"--cache-dir: the caches of {paths.out} lie in {state.caches}, not in {paths.caches}. Give the old place, or "
            "move the folder there first."
        )
    state.caches = str(paths.caches)
    _claim_caches(state, paths)


def _claim_caches(state: RunState, paths: RunPaths) -> None:
    """Marks the folder of the caches as this run's. Raises RunError where it is another's."""
    if paths.cache_owner.exists() and paths.cache_owner.read_text() != state.run_id:
        raise RunError(
            f"{paths.caches} holds the caches of another run of the same name; give another --out name or --cache-dir."
        )
    write_atomically(paths.cache_owner, state.run_id.encode())


def _begin_from_stage(state: RunState, paths: RunPaths, config: Config, from_stage: int | None) -> None:
    """Sets the stages from `from_stage` on back to the beginning, unless an earlier start already did so."""
    if from_stage is None or state.from_stage == from_stage:
        return
    unfinished = [record.stage for record in state.stages[: from_stage - 1] if record.status != "done"]
    if unfinished:
        raise RunError(f"--from-stage {from_stage}: stage {unfinished[0]} is not done yet; leave --from-stage out.")
    _refuse(_changes(paths, config, range(1, from_stage), {"shape"}), paths, config)
    state.from_stage = from_stage
    for record in state.stages[from_stage - 1 :]:
        state.stages[record.stage - 1] = StageRecord(record.stage)
    state.save(paths.state)
    for stage in range(from_stage, len(state.stages) + 1):
        _delete_stage(paths, stage)


def _check_same_options(state: RunState, paths: RunPaths, config: Config) -> None:
    begun = [record.stage for record in state.stages if record.status != "pending"]
    kept = [stage for stage in begun if state.from_stage is not None and stage < state.from_stage]
    _refuse(_changes(paths, config, kept, {"shape"}), paths, config)
    _refuse(
        _changes(paths, config, [stage for stage in begun if stage not in kept], {"shape", "training"}), paths, config
    )


def _changes(
    paths: RunPaths, config: Config, stages: Iterable[int], scopes: set[str]
) -> list[tuple[int, Option, object, object]]:
    return [
        (stage, *change)
        for stage in stages
        if paths.stage_config(stage).exists()
        for change in changed_options(load(paths.stage_config(stage)), config, scopes)
    ]


def _refuse(changes: list[tuple[int, Option, object, object]], paths: RunPaths, config: Config) -> None:
    if not changes:
        return
    stage, option, old, new = changes[0]
    name = f"{option.flag} ({option.key})" if option.flag else option.key
    more = len({change[1].key for change in changes}) - 1
    others = f" (and {more} more)" if more else ""
    if option.scope == "training":
        ways = f"give {old} again, or retrain with --from-stage {stage}"
    else:
        ways = f"give {old} again, or start anew with --overwrite or another --out"
    raise ConfigError(
        f"{name} was {old} when stage {stage} of {paths.out} was trained and is {new} now{others}: {ways}."
    )


def _delete_stage(paths: RunPaths, stage: int) -> None:
    shutil.rmtree(paths.stage(stage), ignore_errors=True)
    cache = paths.cache(stage)
    for path in (cache, cache.with_name(cache.name + ".part"), cache.with_name(cache.name + ".journal")):
        path.unlink(missing_ok=True)
    paths.encoder.unlink(missing_ok=True)


def _delete_run(paths: RunPaths) -> None:
    """Deletes what a run writes, and nothing else: a user's own notes in the folder stay."""
    state = RunState.load(paths.state)
    old = RunPaths(paths.out, Path(state.caches))
    if old.cache_owner.exists() and old.cache_owner.read_text() == state.run_id:
        for record in state.stages:
            _delete_stage(old, record.stage)
        old.cache_owner.unlink()
    # run.json goes last: until then the folder is still known as a run's.
    for path in (old.out / "stages", old.out / "probes"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (old.encoder, old.config, old.log, old.out / "report.html", old.state):
        path.unlink(missing_ok=True)

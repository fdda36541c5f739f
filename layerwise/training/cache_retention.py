"""The caches that a run has on its disk: opened, freed where nobody reads them any more, deleted where they cannot be used.

Frees the room that a run's caches take; what a later start needs of them is made again from the weights."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from layerwise.cache import ActivationCache
from layerwise.cache.inventory import all_unsealed, cache_files
from layerwise.errors import CacheError, RunError, UnusableCache
from layerwise.events import Message, Notify
from layerwise.files import exclusive
from layerwise.run_store import RunState, RunStore, open_run
from layerwise.training.cache_plan import retained_caches
from layerwise.training.resume import find_what_is_missing
from layerwise.training.run import Round


def open_cache(stage: int, round: Round) -> ActivationCache:
    """Raises UnusableCache where it cannot be used, RunError where it is another run's."""
    cache = ActivationCache(round.store.cache(stage))
    expected = round.state.record(stage).fingerprint
    if cache.layout.fingerprint != expected:
        cache.close()
        raise RunError(
            f"{cache.path} was not made by this run (its fingerprint is {cache.layout.fingerprint[:12]}, expected "
            f"{str(expected)[:12]}); retrain with --from-stage {stage}, or name another --cache-dir."
        )
    return cache


def check_retained_caches(round: Round) -> None:
    """Opens the caches that a run keeps of stages that are done; those of others are opened when they are used.

    Raises UnusableCache where one cannot be used.
    """
    for stage in retained_caches(round.state, round.keep):
        if round.state.record(stage).status == "done" and round.store.cache(stage).exists():
            open_cache(stage, round).close()


def delete_unneeded_caches(round: Round) -> None:
    """Frees what no stage reads or writes any more and --keep does not name, whatever a kill has left of it."""
    keep = retained_caches(round.state, round.keep)
    unsealed = {record.stage for record in round.state.stages if record.status == "caching"}
    left = [
        file for file in cache_files(round.store.caches) if file.stage not in (keep if file.is_sealed else unsealed)
    ]
    for record in round.state.stages:
        if record.stage in {file.stage for file in left if file.is_sealed}:
            record.cache = record.cache_bytes = None
    if left:
        round.save()
    for file in left if round.run.ranks.first else ():
        file.path.unlink(missing_ok=True)


def mend(error: UnusableCache, round: Round, notify: Notify) -> None:
    """Deletes a cache that cannot be used, and has it made again. Raises RunError where it cannot be deleted."""
    notify(Message(f"{error.finding}; it is made again from below."))
    try:
        error.path.unlink(missing_ok=True)
    except OSError as failed:
        raise RunError(f"{error.finding}, and cannot be deleted: {failed.strerror}.") from None
    find_what_is_missing(round.state, round.store, round.keep)
    round.save()


def remove_caches(run_directory: Path, stages: Sequence[int] | None) -> int:
    """Deletes the caches of these stages (None: of all) of a run that nobody is running. Gives the bytes that are free now.

    Raises RunError where the run is running, CacheError where a stage has no cache.
    """
    store, state = open_run(run_directory)
    freed, busy = 0, RunError(f"{run_directory} is running; stop it first.")
    rounds = [open_run(folder) for folder in sorted((store.out / "rounds").glob("*")) if (folder / "run.json").exists()]
    with ExitStack() as held:
        for lock in (store.lock, store.task_lock, *(of_round.task_lock for of_round, _ in rounds)):
            held.enter_context(exclusive(lock, busy))
        numbers = [record.stage for record in state.stages] if stages is None else stages
        for stage in numbers:
            if not 1 <= stage <= len(state.stages):
                raise CacheError(f"--stage {stage}: {run_directory} has stages 1 to {len(state.stages)}.")
            if stages is not None and not any(each.cache(stage).exists() for each, _ in [(store, state), *rounds]):
                raise CacheError(
                    f"Stage {stage} of {run_directory} has no cache; see: layerwise cache ls {run_directory}."
                )
        for of_round, state_of_round in [(store, state), *rounds]:
            freed += _remove(of_round, state_of_round, numbers)
            if stages is None:
                of_round.cache_owner.unlink(missing_ok=True)  # nothing is left that could be taken for another run's
    return freed


def _remove(store: RunStore, state: RunState, stages: Sequence[int]) -> int:
    freed = 0
    for stage in stages:
        record = state.record(stage)
        record.cache = record.cache_bytes = None
        state.save(store.state)
        for path in (store.cache(stage), *all_unsealed(store.cache(stage))):
            if path.exists():
                freed += path.stat().st_blocks * 512
                path.unlink()
    return freed

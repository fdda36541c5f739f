"""Opens the caches that a run has on its disk, deletes those that nobody reads any more, and has unusable ones made again.

A cache that was deleted is made again from the weights when a later start needs it.
"""

from collections.abc import Sequence
from pathlib import Path

from layerwise.cache import ActivationCache
from layerwise.errors import CacheError, RunError, UnusableCache
from layerwise.events import Message, Notify
from layerwise.run_store import RunStore, cache_files, open_run
from layerwise.training.cache_plan import retained_caches
from layerwise.training.resume import find_what_is_missing
from layerwise.training.run import Round


def open_cache(stage: int, round: Round) -> ActivationCache:
    """Raises UnusableCache where it cannot be used, CacheError where it is another run's or of another network."""
    cache, specs = (
        ActivationCache(round.store.cache(stage), str(round.state.record(stage).fingerprint)),
        round.run.specs,
    )
    if stage < len(specs) and cache.frame_shape != specs[stage].frame_shape:
        cache.close()
        found, expected = (" x ".join(map(str, shape)) for shape in (cache.frame_shape, specs[stage].frame_shape))
        raise CacheError(
            f"Stage {stage} of {round.store.out} gives {found} and stage {stage + 1} reads {expected}: an earlier version of "
            "layerwise built the network otherwise. Begin anew with --overwrite, or with another --out."
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
    if round.run.ranks.first:
        round.store.delete_cache_files(left)


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
    freed = 0
    store, state = open_run(run_directory)
    count = len(state.stages)
    for stage in stages or ():
        if not 1 <= stage <= count:
            raise CacheError(f"--stage {stage}: {run_directory} has stages 1 to {count}.")
    named = store.named_caches(state)
    if named not in (None, store.caches) and cache_files(named):
        raise CacheError(
            f"{named} holds caches and does not say that they are those of {run_directory}"
            f"{RunStore(run_directory, named).whose_caches()}; this run has none of its own."
        )
    if named is None and any(record.cache for record in state.stages):
        raise CacheError(
            f"The caches of {run_directory} do not lie where they lay, seen from it: {state.caches}. Move them there, or start "
            "the run again with the --cache-dir where they are."
        )
    with store.lock_stopped() as rounds:
        for stage in stages or ():
            if not any(store.cache(stage).exists() for store, _ in rounds):
                raise CacheError(
                    f"Stage {stage} of {run_directory} has no cache; see: layerwise cache ls {run_directory}."
                )
        chosen = range(1, count + 1) if stages is None else stages
        # Deleted before anything is written: the disk may be full. A cache that is gone is made again, whatever run.json says.
        for store, _ in rounds:
            freed += sum(map(store.delete_cache, chosen))
        for store, state in rounds:
            for stage in chosen:
                record = state.record(stage)
                record.cache = record.cache_bytes = None
            store.save_state(state)
    return freed

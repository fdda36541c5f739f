"""The caches that a run has on its disk: opened, freed where nobody reads them any more, deleted where they cannot be used."""

from layerwise.cache import ActivationCache
from layerwise.cache.unsealed import cache_files
from layerwise.errors import RunError, UnusableCache
from layerwise.events import Message
from layerwise.training.resume import find_what_is_missing
from layerwise.training.run import Run
from layerwise.training.storage import kept_caches


def open_cache(stage: int, run: Run) -> ActivationCache:
    """Raises UnusableCache where it cannot be used, RunError where it is another run's."""
    cache = ActivationCache(run.paths.cache(stage))
    expected = run.state.record(stage).fingerprint
    if cache.layout.fingerprint != expected:
        cache.close()
        raise RunError(
            f"{cache.path} was not made by this run (its fingerprint is {cache.layout.fingerprint[:12]}, expected "
            f"{str(expected)[:12]}); retrain with --from-stage {stage}, or name another --cache-dir."
        )
    return cache


def check_kept(run: Run) -> None:
    """Opens the caches that a run keeps of stages that are done; those of others are opened when they are used.

    Raises UnusableCache where one cannot be used.
    """
    for stage in kept_caches(run.state, run.keep):
        if run.state.record(stage).status == "done" and run.paths.cache(stage).exists():
            open_cache(stage, run).close()


def delete_leftovers(run: Run) -> None:
    """Frees what no stage reads or writes any more and --keep does not name, whatever a kill has left of it."""
    keep = kept_caches(run.state, run.keep)
    unsealed = {record.stage for record in run.state.stages if record.status == "caching"}
    left = [file for file in cache_files(run.paths.caches) if file.stage not in (keep if file.is_sealed else unsealed)]
    for record in run.state.stages:
        if record.stage in {file.stage for file in left if file.is_sealed}:
            record.cache = record.cache_bytes = None
    if left:
        run.save()
    for file in left if run.ranks.first else ():
        file.path.unlink(missing_ok=True)


def mend(error: UnusableCache, run: Run) -> None:
    """Deletes a cache that cannot be used, and has it made again. Raises RunError where it cannot be deleted."""
    run.notify(Message(f"{error.finding}; it is made again from below."))
    try:
        error.path.unlink(missing_ok=True)
    except OSError as failed:
        raise RunError(f"{error.finding}, and cannot be deleted: {failed.strerror}.") from None
    find_what_is_missing(run.state, run.paths, run.keep)
    run.save()

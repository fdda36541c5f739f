"""Frees the room that a run's caches take; what a later start needs of them is made again from the weights."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from layerwise.cache.unsealed import all_unsealed
from layerwise.errors import CacheError, RunError
from layerwise.files import exclusive
from layerwise.run_directory import RunPaths, RunState, open_run


def remove_caches(run_directory: Path, stages: Sequence[int] | None) -> int:
    """Deletes the caches of these stages (None: of all) of a run that nobody is running. Gives the bytes that are free now.

    Raises RunError where the run is running, CacheError where a stage has no cache.
    """
    paths, state = open_run(run_directory)
    freed, busy = 0, RunError(f"{run_directory} is running; stop it first.")
    rounds = [open_run(folder) for folder in sorted((paths.out / "rounds").glob("*")) if (folder / "run.json").exists()]
    with ExitStack() as held:
        for lock in (paths.lock, paths.task_lock, *(of_round.task_lock for of_round, _ in rounds)):
            held.enter_context(exclusive(lock, busy))
        numbers = [record.stage for record in state.stages] if stages is None else stages
        for stage in numbers:
            if not 1 <= stage <= len(state.stages):
                raise CacheError(f"--stage {stage}: {run_directory} has stages 1 to {len(state.stages)}.")
            if stages is not None and not any(each.cache(stage).exists() for each, _ in [(paths, state), *rounds]):
                raise CacheError(
                    f"Stage {stage} of {run_directory} has no cache; see: layerwise cache ls {run_directory}."
                )
        for of_round, state_of_round in [(paths, state), *rounds]:
            freed += _remove(of_round, state_of_round, numbers)
            if stages is None:
                of_round.cache_owner.unlink(missing_ok=True)  # nothing is left that could be taken for another run's
    return freed


def _remove(paths: RunPaths, state: RunState, stages: Sequence[int]) -> int:
    freed = 0
    for stage in stages:
        record = state.record(stage)
        record.cache = record.cache_bytes = None
        state.save(paths.state)
        for path in (paths.cache(stage), *all_unsealed(paths.cache(stage))):
            if path.exists():
                freed += path.stat().st_blocks * 512
                path.unlink()
    return freed

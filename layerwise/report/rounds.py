"""All stages of a run in rounds at once: what each is at, which version it has published, how far it is behind."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from layerwise.files import is_locked
from layerwise.report.summary import stage_status, table
from layerwise.run_directory import RunPaths, RunState, StageRecord


@dataclass(frozen=True, slots=True)
class RoundState:
    """A round of a run as the disk has it."""

    number: int
    stages: list[StageRecord]
    worker: str | None
    """Who performs a task of it now; None where nobody does."""


def round_states(paths: RunPaths, rounds: int) -> list[RoundState]:
    """Every round that is prepared, in order. Raises RunError where one cannot be read."""
    states = []
    for number in range(1, rounds + 1):
        of_round = paths.round(number, rounds)
        if of_round.state.exists():
            worker = of_round.task_lock.read_text().strip() if is_locked(of_round.task_lock) else None
            states.append(RoundState(number, RunState.load(of_round.state).stages, worker))
    return states


def published(states: Sequence[RoundState], stage: int) -> int:
    """The newest version of a stage's outputs: the round that it was done in last; 0 where there is none."""
    return max((state.number for state in states if state.stages[stage - 1].status == "done"), default=0)


def rounds_table(states: Sequence[RoundState], rounds: int) -> Table:
    """One row per stage, within 100 columns."""
    shown = table("stage", "status", "round", "version", "behind", "loss", "worker")
    for stage in range(1, len(states[0].stages) + 1):
        version = published(states, stage)
        # In hand is the round behind the version; where all are done, the last one.
        here = next((state for state in states if state.number == min(version + 1, rounds)), states[-1])
        record = here.stages[stage - 1]
        behind = published(states, 1) - version
        shown.add_row(
            str(stage),
            stage_status(record) if record.status != "pending" or version == 0 else "waiting",
            f"{here.number} of {rounds}",
            str(version or "-"),
            _rounds(behind),
            f"{record.best_loss:.4f}" if record.best_loss is not None else "",
            here.worker if here.worker and record.status in ("training", "caching") else "",
        )
    return shown


def _rounds(count: int) -> str:
    return "" if not count else f"{count} round" if count == 1 else f"{count} rounds"

"""The tasks of a run and their order. Task (s, r) trains stage s for round r; sequential training is one round.

A stop that all ranks make at the same step, whichever of them was asked."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from layerwise.memory.ranks import Ranks
from layerwise.stop import StopFlag


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """Train stage `stage` for round `round` (both from 1) and publish its outputs."""

    round: int
    stage: int

    @property
    def needs(self) -> tuple["Task", ...]:
        """Its own weights of the round before, and the outputs of the stage below in this round."""
        before = (Task(self.round - 1, self.stage),) if self.round > 1 else ()
        below = (Task(self.round, self.stage - 1),) if self.stage > 1 else ()
        return before + below


def ready(waiting: Sequence[Task], undone: Collection[Task]) -> Task | None:
    """The first waiting task that needs none of those that are not done; None where all of them do."""
    return next((task for task in waiting if not any(need in undone for need in task.needs)), None)


def tasks_of_run(stages: int, rounds: int = 1) -> list[Task]:
    """Every task, each behind those that it needs."""
    return [Task(round, stage) for round in range(1, rounds + 1) for stage in range(1, stages + 1)]


def asked_to_stop(stop: StopFlag, ranks: Ranks) -> bool:
    """Whether any rank was; the flag is then set on all of them. Each calls it as often as the others.

    What it answers counts, and not the flag: a signal that comes behind it waits for the next call.
    """
    if not ranks.any(stop.reason is not None):
        return False
    stop.reason = next(reason for reason in ranks.all_gather(stop.reason) if reason)
    return True


def stop_together(stop: StopFlag, ranks: Ranks, where: str) -> None:
    """Raises Interrupted on all ranks where any was asked to stop. `where` ends the sentence."""
    if asked_to_stop(stop, ranks):
        stop.raise_if_set(where)

"""The tasks of a run and their order. Task (s, r) trains stage s for round r; sequential training is one round."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


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

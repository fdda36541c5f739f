"""Performs the tasks of a run one after another in this process."""

from collections.abc import Callable, Sequence

from layerwise.training.schedule import Task


def execute(tasks: Sequence[Task], perform: Callable[[Task], None]) -> None:
    """Takes the first task whose needs are met until none is left. Raises what `perform` raises."""
    waiting, done = list(tasks), set()
    while waiting:
        task = next(task for task in waiting if all(need in done for need in task.needs))
        perform(task)
        done.add(task)
        waiting.remove(task)

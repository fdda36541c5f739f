"""Performs the tasks of a run one after another in this process."""

from collections.abc import Sequence

from layerwise.engines.task_runner import TaskRunner
from layerwise.events import Notify
from layerwise.stop import StopFlag
from layerwise.training.schedule import Task


def execute(tasks: Sequence[Task], run: TaskRunner, stop: StopFlag, notify: Notify) -> None:
    """In the order given, in which each task comes behind those that it needs."""
    for task in tasks:
        run.perform(task, stop, notify)

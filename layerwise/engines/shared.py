"""Performs the tasks of a run in several ranks together: the first prepares it, the others follow.

The others open the run from the disk once it is prepared. From then on all do the same at the same time, each with its
share of the samples; the first alone writes and tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerwise.engines.joining import device_of
from layerwise.engines.opened import OpenedRun, reopen
from layerwise.errors import Interrupted, ToldElsewhere
from layerwise.events import Notify, silent
from layerwise.memory.ranks import LostRank, Ranks
from layerwise.stop import StopFlag
from layerwise.training.planner import StageLayout
from layerwise.training.schedule import Task


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the first rank tells the others when the run is prepared."""

    out: Path
    device: str
    """As the options name it."""
    tasks: list[Task]
    layouts: list[StageLayout]
    """As the first device has room for them: all ranks must go through a batch in as many passes."""


def execute(tasks: Sequence[Task], run: OpenedRun, stop: StopFlag, notify: Notify) -> None:
    """In the first rank: has the others perform the tasks along with it."""
    run.ranks.heard(Prepared(run.paths.out.resolve(), run.config.training.device, list(tasks), run.layouts))
    _perform(tasks, run, stop, notify)


def follow(ranks: Ranks, stop: StopFlag) -> OpenedRun:
    """In every other rank: waits until the run is prepared, and performs the tasks along with the first.

    Raises ToldElsewhere where the first ends without having prepared it, and where all of them stop.
    """
    try:
        prepared: Prepared = ranks.heard()
    except LostRank as lost:
        raise ToldElsewhere(str(lost), lost.exit_code) from None
    opened = reopen(prepared.out, str(device_of(prepared.device, ranks)))
    opened = replace(opened, layouts=prepared.layouts, ranks=ranks)
    try:
        _perform(prepared.tasks, opened, stop, silent)
    except Interrupted as stopped:
        raise ToldElsewhere(str(stopped), stopped.exit_code) from None
    return opened


def _perform(tasks: Sequence[Task], run: OpenedRun, stop: StopFlag, notify: Notify) -> None:
    for task in tasks:
        run.perform(task, stop, notify)

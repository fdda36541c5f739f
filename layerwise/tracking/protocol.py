"""What a service that shows curves can do."""

from collections.abc import Callable, Mapping
from typing import Protocol

from layerwise.config import Config
from layerwise.run_store import RunStore


class Tracker(Protocol):
    """One run at a service. A method may raise whatever the service's own package raises."""

    def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a stage by name; `step` counts epochs of this stage from 1 and never falls, over all starts."""
        ...

    def close(self, done: bool) -> None:
        """After the last numbers of this start; done: the run is finished, not stopped and not failed."""
        ...


Open = Callable[[RunStore, str, Config], Tracker]
"""Opens the run of this id at a service, or goes on with it."""


class Nowhere:
    """The service of a run that names none."""

    def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self, done: bool) -> None:
        """Nothing."""


def shown_name(store: RunStore) -> str:
    """NAME of runs/NAME; METHOD/seed-N of a run that is part of a comparison."""
    out = store.out.resolve()
    return f"{out.parent.name}/{out.name}" if out.name.startswith("seed-") else out.name

"""What comparisons find, as compare.json holds it.

Nothing here needs torch, so that a report can be written without it.
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from layerwise.errors import RunError
from layerwise.records import STRICT, Count, Share, read_record, write_record
from layerwise.run_store.state import Number

GREEDY = "greedy-infomax"
UNTRAINED = "untrained"

_TO_CONVERGENCE: Mapping[str, Any] = {
    "training.max_epochs": 1000,  # as many as the paper has for speech; its patience ends it
    "training.cosine": False,  # its end would have to be known
}

METHODS: Mapping[str, Mapping[str, Any]] = {
    GREEDY: {},
    "greedy-infomax-simultaneous": {
        "training.schedule": "simultaneous",
        # Against inputs that never change, which only training one after another has.
        "training.input_noise": 0.0,
        "training.frame_dropout": 0.0,
    },
    "cpc": {"training.stages": 1},
    "greedy-supervised": {"objective.name": "supervised"},
    "supervised": {"training.stages": 1, "objective.name": "supervised"},
    "cpc-converged": {"training.stages": 1, **_TO_CONVERGENCE},
    "supervised-converged": {"training.stages": 1, "objective.name": "supervised", **_TO_CONVERGENCE},
    UNTRAINED: {},
}
"""Name to the options in which it differs from a run that trains stage by stage; `untrained` is not run at all."""

EQUALLY_LONG = tuple(method for method, changes in METHODS.items() if not _TO_CONVERGENCE.items() <= changes.items())
"""Those that train every module for the same number of epochs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One method with one seed."""

    __pydantic_config__ = STRICT

    method: str
    seed: Count
    errors: tuple[Share, ...]
    """On the test samples, from 0 to 1, of the features after each module."""
    peak_bytes: Count
    """Highest of all stages, in training and in caching."""
    disk_bytes: Count
    """Most that its caches take at once; where they are compressed, before they are."""
    seconds: Annotated[float, Field(ge=0)]
    """Of training and caching."""


@dataclass(frozen=True, slots=True)
class ModuleError:
    """Over the seeds; the spread is the standard deviation of the sample, 0 where there is one seed."""

    stage: int
    error_mean: float
    error_std: float


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method over its seeds; bytes and seconds are medians."""

    method: str
    seeds: list[int]
    peak_bytes: int
    disk_bytes: int
    seconds: float
    stages: list[ModuleError]

    @classmethod
    def of(cls, outcomes: list[Outcome]) -> "MethodResult":
        """From its outcomes with all seeds."""
        by_stage = enumerate(zip(*(outcome.errors for outcome in outcomes), strict=True), start=1)
        return cls(
            method=outcomes[0].method,
            seeds=[outcome.seed for outcome in outcomes],
            peak_bytes=round(statistics.median(outcome.peak_bytes for outcome in outcomes)),
            disk_bytes=round(statistics.median(outcome.disk_bytes for outcome in outcomes)),
            seconds=statistics.median(outcome.seconds for outcome in outcomes),
            stages=[
                ModuleError(stage, statistics.mean(errors), statistics.stdev(errors) if len(errors) > 1 else 0.0)
                for stage, errors in by_stage
            ],
        )


COMPARISON = "compare.json"


@dataclass(slots=True)
class Comparison:
    """compare.json, which also holds its `methods`."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}

    label: str
    epochs: Count
    data_identity: str
    cut: list[Number]
    """Layers in each module, of every method; decided at the first start."""
    finished: bool = False
    """Whether the newest start has done what it was asked, and every method has the same seeds."""
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def methods(self) -> list[MethodResult]:
        """In the order of METHODS."""
        by_method = ([each for each in self.outcomes if each.method == method] for method in METHODS)
        return [MethodResult.of(outcomes) for outcomes in by_method if outcomes]

    def save(self, out: Path) -> None:
        """Replaces the file in the folder atomically. Raises RunError."""
        write_record(out / COMPARISON, self, methods=[asdict(method) for method in self.methods])


def load_comparison(out: Path) -> Comparison:
    """What is known so far. Raises RunError where the folder holds no readable compare.json."""
    if not (out / COMPARISON).exists():
        raise RunError(f"{out} holds no comparison; make one with: layerwise compare --out {out} --label NAME.")
    return read_record(Comparison, out / COMPARISON)

"""What probes and comparisons find, as probes/LABEL.json and compare.json hold it.

Nothing here needs torch, so that a report can be written without it.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from layerwise.errors import RunError
from layerwise.files import write_json


@dataclass(frozen=True, slots=True)
class Confusion:
    """Test rows of each class, by the class that was predicted."""

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    counts: list[list[int]]
    """[true class][predicted class]"""

    def __post_init__(self) -> None:
        if [len(row) for row in self.counts] != [len(self.classes)] * len(self.classes):
            raise ValueError("counts is not a square of classes")


@dataclass(frozen=True, slots=True)
class StageError:
    """Error rates from 0 to 1; train and test count samples, or frames where the label is per frame."""

    stage: int
    error: float
    untrained_error: float
    train: int
    test: int
    confusion: Confusion | None
    """Of the trained stage; None where there are too many classes."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe of every finished stage."""

    label: str
    stages: Annotated[list[StageError], Field(min_length=1)]
    peak_bytes: int
    """Most that the probe held on the device."""
    classifier: str
    """linear or knn."""


GREEDY = "greedy-infomax"
UNTRAINED = "untrained"

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
    UNTRAINED: {},
}
"""Name to the options in which it differs from a run that trains stage by stage; `untrained` is not run at all."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One method with one seed."""

    method: str
    seed: int
    errors: tuple[float, ...]
    """On the test samples, from 0 to 1, of the features after each module."""
    peak_bytes: int
    """Highest of all stages, in training and in caching."""
    disk_bytes: int
    """Most that its caches take at once; where they are compressed, before they are."""
    seconds: float
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
    """compare.json."""

    label: str
    epochs: int
    data_identity: str
    cut: list[int]
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
        write_json(out / COMPARISON, asdict(self) | {"methods": [asdict(method) for method in self.methods]})


def load_comparison(out: Path) -> Comparison:
    """What is known so far. Raises RunError where the folder holds no readable compare.json."""
    try:
        return TypeAdapter(Comparison).validate_python(json.loads((out / COMPARISON).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunError(
            f"{out} holds no comparison; make one with: layerwise compare --out {out} --label NAME."
        ) from None
    except ValueError:
        raise RunError(f"{out / COMPARISON} is damaged; move it away and start the same command again.") from None

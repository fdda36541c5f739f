"""What a probe finds, as probes/LABEL.json holds it."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from layerwise.records import STRICT, Count, Digest, Share
from layerwise.run_store.state import Number


@dataclass(frozen=True, slots=True)
class Confusion:
    """Test rows of each class, by the class that was predicted."""

    __pydantic_config__ = STRICT

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    counts: list[list[Count]]
    """[true class][predicted class]"""

    def __post_init__(self) -> None:
        if [len(row) for row in self.counts] != [len(self.classes)] * len(self.classes):
            raise ValueError("counts is not a square of classes")


@dataclass(frozen=True, slots=True)
class StageError:
    """Error rates from 0 to 1; train and test count samples, or frames where the label is per frame."""

    __pydantic_config__ = STRICT

    stage: Number
    error: Share
    untrained_error: Share
    train: Count
    test: Count
    confusion: Confusion | None
    """Of the trained stage; None where there are too many classes."""
    weights: Digest
    """Digest of the weights that were probed."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe of every finished stage."""

    __pydantic_config__ = STRICT

    label: str
    stages: Annotated[list[StageError], Field(min_length=1)]
    peak_bytes: Count
    """Most that the probe held on the device."""
    classifier: str
    """linear or knn."""

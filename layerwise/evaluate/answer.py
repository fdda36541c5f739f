"""What a classifier makes of the features of one stage."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from layerwise.evaluate.examples import Examples, Poll, unasked
from layerwise.evaluate.feature_rows import FeatureRows
from layerwise.evaluate.linear import linear_predictions
from layerwise.evaluate.nearest import nearest_predictions
from layerwise.evaluate.question import Truth

CLASSIFIERS: dict[str, Callable[[Examples], np.ndarray]] = {
    "linear": linear_predictions,
    "knn": nearest_predictions,
}

MOST_CONFUSED = 100
"""Classes beyond which a confusion matrix is not kept: nobody could read it."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Test rows of each class, by the class that was predicted."""

    classes: tuple[str, ...]
    counts: list[list[int]]
    """[true class][predicted class]"""


@dataclass(frozen=True, slots=True)
class Answer:
    """On the test rows."""

    error: float
    """From 0 to 1."""
    confusion: Confusion | None


def answer(features: FeatureRows, truth: Truth, classifier: str, poll: Poll = unasked) -> Answer:
    """Fits the classifier and tests it. `poll` is called before each piece of the features and may raise."""
    predicted = CLASSIFIERS[classifier](Examples(features, truth.classes, truth.parts, poll))
    right = truth.classes[truth.parts.test.start :]
    confusion = None
    if len(truth.names) <= MOST_CONFUSED:
        counts = np.zeros((len(truth.names), len(truth.names)), dtype=np.int64)
        np.add.at(counts, (right, predicted), 1)
        confusion = Confusion(truth.names, counts.tolist())
    return Answer(float((predicted != right).mean()), confusion)

"""Classifiers on frozen features of one stage: a linear one, and the nearest neighbours.

Linear: multinomial logistic regression, fitted by L-BFGS. Penalties are tried from strong to weak, each fit starting from the
one before, until the error on held-out rows stops falling.

Nearest neighbours: by cosine, each voting with weight exp(cosine / T), T = 0.07 (Wu et al. 2018, arXiv 1805.01978); the
held-out rows choose k.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from layerwise.evaluate.examples import Examples, FeatureRows, Poll
from layerwise.evaluate.targets import ProbeTargets
from layerwise.run_store.state import Confusion

NEIGHBOURS = (1, 5, 20, 100)
TEMPERATURE = 0.07

QUERY_ROWS = 1024
"""Rows whose neighbours are looked for at once."""


def nearest_predictions(examples: Examples) -> np.ndarray:
    """int64, the class that is predicted for each row of the test, from training and held-out rows."""
    parts, k = examples.parts, NEIGHBOURS[0]
    if len(parts.held_out):
        votes = _votes(examples, parts.held_out, parts.train)
        k = min(NEIGHBOURS, key=lambda k: float((votes[k] != examples.classes(parts.held_out)).mean()))
    return _votes(examples, parts.test, parts.fitted)[k]


def _votes(examples: Examples, queries: range, known: range) -> dict[int, np.ndarray]:
    """For each k, the class that the neighbours of each query row vote for."""
    predicted: dict[int, list[torch.Tensor]] = {k: [] for k in NEIGHBOURS}
    for whole, _ in examples.pieces(queries):
        for x in whole.split(QUERY_ROWS):
            cosines, classes = _neighbours(examples, F.normalize(x), known)
            for k, of_k in predicted.items():
                weights = (cosines[:, :k] / TEMPERATURE).exp()
                per_class = torch.zeros(len(x), examples.count).scatter_add_(1, classes[:, :k], weights)
                of_k.append(per_class.argmax(1))
    return {k: torch.cat(of_k).numpy() for k, of_k in predicted.items()}


def _neighbours(examples: Examples, x: torch.Tensor, known: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and classes [n, k] of the nearest known rows, nearest first; at most the largest k."""
    cosines, classes = torch.empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64)
    for candidates, of_candidates in examples.pieces(known):
        for some, of_some in zip(candidates.split(QUERY_ROWS), of_candidates.split(QUERY_ROWS), strict=True):
            cosines = torch.cat([cosines, x @ F.normalize(some).T], dim=1)
            classes = torch.cat([classes, of_some.expand(len(x), -1)], dim=1)
            cosines, order = cosines.topk(min(max(NEIGHBOURS), cosines.shape[1]))
            classes = classes.gather(1, order)
    return cosines, classes


PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weights of the squared norm."""

PATIENCE = 2
"""Penalties without a lower held-out error before the rest is not tried."""

ITERATIONS = 200

Classifier = tuple[torch.Tensor, torch.Tensor]
"""Weight [classes, C] and bias [classes]."""


def linear_predictions(examples: Examples) -> np.ndarray:
    """int64, the class that is predicted for each row of the test.

    The classifier is fitted to the training rows for each penalty; that of the lowest held-out error then to training
    and held-out rows together.
    """
    classifier = torch.zeros(examples.count, examples.channels), torch.zeros(examples.count)
    best, best_error, without = (classifier, PENALTIES[0]), float("inf"), 0
    for penalty in PENALTIES if len(examples.parts.held_out) else PENALTIES[:1]:
        classifier = _fit(examples, examples.parts.train, penalty, classifier)
        error = _error(examples, classifier)
        without = 0 if error < best_error else without + 1
        if error < best_error:
            best, best_error = (classifier, penalty), error
        if without == PATIENCE:
            break
    start, penalty = best
    return _predicted(examples, examples.parts.test, _fit(examples, examples.parts.fitted, penalty, start))


def _fit(examples: Examples, rows: range, penalty: float, start: Classifier) -> Classifier:
    weight, bias = (value.clone().requires_grad_() for value in start)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = penalty * weight.square().sum()
        total.backward()
        for x, y in examples.pieces(rows):
            loss = F.cross_entropy(F.linear(x, weight, bias), y, reduction="sum") / len(rows)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _error(examples: Examples, classifier: Classifier) -> float:
    """On the held-out rows."""
    rows = examples.parts.held_out
    return float((_predicted(examples, rows, classifier) != examples.classes(rows)).mean()) if len(rows) else 0.0


def _predicted(examples: Examples, rows: range, classifier: Classifier) -> np.ndarray:
    return np.concatenate([F.linear(x, *classifier).argmax(1).numpy() for x, _ in examples.pieces(rows)])


CLASSIFIERS: dict[str, Callable[[Examples], np.ndarray]] = {
    "linear": linear_predictions,
    "knn": nearest_predictions,
}

MOST_CONFUSED = 100
"""Classes beyond which a confusion matrix is not kept: nobody could read it."""


def fit_and_test(
    features: FeatureRows, targets: ProbeTargets, classifier: str, poll: Poll = lambda: None
) -> tuple[float, Confusion | None]:
    """Fits the classifier; gives its error on the test rows, from 0 to 1, and which classes it took for which.

    poll: is called before each piece of the features and may raise.
    """
    predicted = CLASSIFIERS[classifier](Examples(features, targets.classes, targets.parts, poll))
    correct, count = targets.classes[targets.parts.test.start :], len(targets.names)
    error = float((predicted != correct).mean())
    if count > MOST_CONFUSED:
        return error, None
    counts = np.zeros((count, count), dtype=np.int64)
    np.add.at(counts, (correct, predicted), 1)
    return error, Confusion(targets.names, counts.tolist())

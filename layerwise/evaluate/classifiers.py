"""Classifiers on frozen features of one stage: a linear one, and the nearest neighbours.

Linear: multinomial logistic regression. Penalties are tried from strong to weak, each fit starting from the one before, until
the error on held-out rows stops falling. Where these are few, each quarter of the training and held-out rows is held out once.

Nearest neighbours: by cosine, each voting with weight exp(cosine / T), T = 0.07 (Wu et al. 2018, arXiv 1805.01978); the
held-out rows choose k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from layerwise.evaluate.examples import QUARTERS, Examples, FeatureRows, Parts, Poll, Rows
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

ITERATIONS = 20
"""Of L-BFGS for each penalty that is tried; the fit that is tested takes twice as many."""

BLOCK = 512
"""Neighbouring channels whose correlation the fit knows."""

Classifier = tuple[torch.Tensor, torch.Tensor]
"""Weight [classes, C] and bias [classes]."""


def linear_predictions(examples: Examples) -> np.ndarray:
    """int64, the class that is predicted for each row of the test.

    The classifier is fitted to training and held-out rows together, with the penalty by which the fewest of those that were
    held out from a fit were taken for another class.
    """
    fit = partial(_fit, examples, correlations=_correlations(examples))
    trials = _trials(examples.parts)
    classifiers = [(torch.zeros(examples.count, examples.channels), torch.zeros(examples.count))] * len(trials)
    start, best, fewest, without = classifiers[0], PENALTIES[0], len(examples.parts.fitted) + 1, 0
    for penalty in PENALTIES:
        classifiers = [fit(trial.fitted, penalty, one) for trial, one in zip(trials, classifiers, strict=True)]
        errors = sum(_errors(examples, trial.held_out, one) for trial, one in zip(trials, classifiers, strict=True))
        without = 0 if errors < fewest else without + 1
        if errors < fewest:
            start, best, fewest = classifiers[0], penalty, errors
        if without == PATIENCE:
            break
    classifier = fit(examples.parts.fitted, best, start, iterations=2 * ITERATIONS)
    return _predicted(examples, examples.parts.test, classifier)


FEWEST_HELD_OUT = 200
"""Rows that may choose a penalty by themselves: of fewer, chance would choose it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows that a classifier is fitted to, and those by which it is judged."""

    fitted: range | Rows
    held_out: range | Rows


def _trials(parts: Parts) -> list[Trial]:
    if len(parts.held_out) >= FEWEST_HELD_OUT:
        return [Trial(parts.train, parts.held_out)]
    # Every fourth row: neighbours often are of one class.
    count = len(parts.fitted)
    return [Trial(Rows(count, quarter, others=True), Rows(count, quarter, others=False)) for quarter in range(QUARTERS)]


def _correlations(examples: Examples) -> list[torch.Tensor]:
    """[BLOCK, BLOCK] between the channels of each block, over the training rows; the last may be smaller."""
    sizes = [BLOCK] * (examples.channels // BLOCK) + [examples.channels % BLOCK] * (examples.channels % BLOCK > 0)
    correlations = [torch.zeros(size, size) for size in sizes]
    for x, _ in examples.pieces(examples.parts.train):
        for block, correlation in zip(x.split(BLOCK, dim=1), correlations, strict=True):
            correlation.addmm_(block.T, block, alpha=1 / len(examples.parts.train))
    return correlations


def _fit(
    examples: Examples,
    rows: range | Rows,
    penalty: float,
    start: Classifier,
    correlations: list[torch.Tensor],
    iterations: int = ITERATIONS,
) -> Classifier:
    """L-BFGS in coordinates in which the loss bends about equally in all directions, so that few steps do.

    Half the correlations bound its second derivative (Böhning 1992, "Multinomial logistic regression algorithm"). Those
    between blocks are left out, and they are of the training rows whatever `rows` are: that changes the way and not its end.
    """
    # In float64, for channels that say nearly the same.
    bends = (correlation.double() / 2 + 2 * penalty * torch.eye(len(correlation)) for correlation in correlations)
    factors = [torch.linalg.cholesky(bend).float() for bend in bends]
    blocks = [len(factor) for factor in factors]

    def weight_of(coordinates: torch.Tensor) -> torch.Tensor:
        parts = zip(factors, coordinates.split(blocks, dim=1), strict=True)
        return torch.cat([torch.linalg.solve_triangular(f, part, upper=False, left=False) for f, part in parts], dim=1)

    parts = zip(factors, start[0].split(blocks, dim=1), strict=True)
    coordinates, bias = torch.cat([part @ factor for factor, part in parts], dim=1), start[1].clone()
    optimizer = torch.optim.LBFGS(
        [coordinates, bias], max_iter=iterations, history_size=iterations, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        weight = weight_of(coordinates)
        loss, gradient, of_bias = penalty * weight.square().sum(), 2 * penalty * weight, torch.zeros_like(bias)
        for x, y in examples.pieces(rows):
            likelihoods = F.linear(x, weight, bias).log_softmax(1)
            loss += F.nll_loss(likelihoods, y, reduction="sum") / len(rows)
            excess = (likelihoods.exp_() - F.one_hot(y, examples.count)) / len(rows)
            gradient.addmm_(excess.T, x)
            of_bias += excess.sum(0)
        parts = zip(factors, gradient.split(blocks, dim=1), strict=True)
        solved = [torch.linalg.solve_triangular(f.T, part, upper=True, left=False) for f, part in parts]
        coordinates.grad, bias.grad = torch.cat(solved, dim=1).contiguous(), of_bias
        return loss

    optimizer.step(closure)
    return weight_of(coordinates), bias


def _errors(examples: Examples, rows: range | Rows, classifier: Classifier) -> int:
    """How many of the rows are taken for another class."""
    return sum(int((F.linear(x, *classifier).argmax(1) != y).sum()) for x, y in examples.pieces(rows))


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

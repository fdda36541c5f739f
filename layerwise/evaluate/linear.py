"""A linear classifier: multinomial logistic regression, fitted by L-BFGS, penalised as the held-out rows choose.

Penalties are tried from strong to weak, each fit going on from the one before, and no further once the held-out error
has stopped falling: a path along which to stop early.
"""

import numpy as np
import torch
import torch.nn.functional as F

from layerwise.evaluate.examples import Examples

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

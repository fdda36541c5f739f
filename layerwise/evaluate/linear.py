"""A linear classifier: multinomial logistic regression, fitted to the end by L-BFGS on standardised features."""

import numpy as np
import torch
import torch.nn.functional as F

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Weights of the squared norm that are tried; the held-out samples choose."""

ITERATIONS = 200


def probe_error(
    features: np.ndarray, classes: np.ndarray, train: np.ndarray, held_out: np.ndarray, test: np.ndarray
) -> float:
    """Error rate on the test rows, from 0 to 1.

    features: float32 [N, C]; classes: int64 [N] from 0; train, held_out, test: row numbers. The penalty with the lowest
    held-out error is taken, and the classifier fitted again on training and held-out rows together.
    """
    x = torch.from_numpy(_standardised(features, train))
    y = torch.from_numpy(classes)
    penalty = PENALTIES[-1]
    if len(held_out):
        errors = [
            _error(_fit(x[train], y[train], int(y.max()) + 1, penalty), x[held_out], y[held_out])
            for penalty in PENALTIES
        ]
        penalty = PENALTIES[int(np.argmin(errors))]
    both = np.concatenate([train, held_out])
    return _error(_fit(x[both], y[both], int(y.max()) + 1, penalty), x[test], y[test])


def _standardised(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    mean, std = features[rows].mean(0), features[rows].std(0)
    # A channel that never varies carries nothing; dividing by its spread would turn rounding into a feature.
    return np.where(std > 1e-6 * (np.abs(mean) + std.max()), (features - mean) / np.maximum(std, 1e-12), 0).astype(
        np.float32
    )


def _fit(x: torch.Tensor, y: torch.Tensor, classes: int, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _error(classifier: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> float:
    predicted = F.linear(x, *classifier).argmax(1)
    return (predicted != y).float().mean().item()

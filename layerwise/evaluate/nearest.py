"""The k nearest neighbours: no training at all, so it shows what lies close together and what does not.

Neighbours by cosine, each voting with weight exp(cosine / T), T = 0.07 (Wu et al. 2018, arXiv 1805.01978); the held-out
rows choose k.
"""

import numpy as np
import torch
import torch.nn.functional as F

from layerwise.evaluate.examples import Examples

NEIGHBOURS = (1, 5, 20, 100)
TEMPERATURE = 0.07

ASKED = 1024
"""Rows whose neighbours are looked for at once."""


def nearest_predictions(examples: Examples) -> np.ndarray:
    """int64, the class that is predicted for each row of the test, from training and held-out rows."""
    parts, k = examples.parts, NEIGHBOURS[0]
    if len(parts.held_out):
        votes = _votes(examples, parts.held_out, parts.train)
        k = min(NEIGHBOURS, key=lambda k: float((votes[k] != examples.classes(parts.held_out)).mean()))
    return _votes(examples, parts.test, parts.fitted)[k]


def _votes(examples: Examples, asked: range, known: range) -> dict[int, np.ndarray]:
    """For each k, the class that the neighbours of each asked row vote for."""
    found: dict[int, list[torch.Tensor]] = {k: [] for k in NEIGHBOURS}
    for whole, _ in examples.pieces(asked):
        for x in whole.split(ASKED):
            cosines, classes = _neighbours(examples, F.normalize(x), known)
            for k, votes in found.items():
                weights = (cosines[:, :k] / TEMPERATURE).exp()
                per_class = torch.zeros(len(x), examples.count).scatter_add_(1, classes[:, :k], weights)
                votes.append(per_class.argmax(1))
    return {k: torch.cat(votes).numpy() for k, votes in found.items()}


def _neighbours(examples: Examples, x: torch.Tensor, known: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and classes [n, k] of the nearest known rows, nearest first; at most the largest k."""
    cosines, classes = torch.empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64)
    for candidates, of_candidates in examples.pieces(known):
        for some, of_some in zip(candidates.split(ASKED), of_candidates.split(ASKED), strict=True):
            cosines = torch.cat([cosines, x @ F.normalize(some).T], dim=1)
            classes = torch.cat([classes, of_some.expand(len(x), -1)], dim=1)
            cosines, order = cosines.topk(min(max(NEIGHBOURS), cosines.shape[1]))
            classes = classes.gather(1, order)
    return cosines, classes

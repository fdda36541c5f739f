"""The hinge loss of CLAPP (Illing, Ventura, Bellec, Gerstner, NeurIPS 2021, arXiv 2010.08262, equation 3).

    loss = mean over k, t of  max(0, 1 - z_t^T W_k c)  +  mean over z' of max(0, 1 + z'^T W_k c)

The first term asks that the future be predicted, the second that the negatives z' be not. CLAPP sees one of the two at a
time, with one negative; both at once is their mean over time ("synchronous" in the paper), and has half the noise.
"""

import torch

from layerwise.objectives.contrastive import Contrastive


class Hinge(Contrastive):
    """Asks each score for the right sign and a margin of 1, whatever the other scores are."""

    @staticmethod
    def of_scores(scores: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See contrastive.OfScores."""
        negatives = scores.shape[1] - 1
        short = scores.neg_()  # by how much a score falls short of its margin
        short[:, 1:].neg_()
        short += 1
        wrong = (short > 0).to(scores.dtype)
        loss = (weights * (short[:, 0].relu() + short[:, 1:].relu().mean(1))).sum()
        of_scores = wrong.mul_(weights[:, None])
        of_scores[:, 0].neg_()
        of_scores[:, 1:] /= negatives
        return loss, of_scores

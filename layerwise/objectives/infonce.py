"""InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equations 3 and 4; Löwe et al. 2019, equations 3 and 4).

    f_k(z, c) = exp(z^T W_k c)        loss = - mean over k, t of log( f_k(z_t, c) / sum over z' in X of f_k(z', c) )

X holds the target and its negatives.
"""

import torch

from layerwise.objectives.contrastive import Contrastive


class InfoNCE(Contrastive):
    """Tells the target from its negatives, as a classifier of 1 + N classes would."""

    @staticmethod
    def of_scores(scores: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See contrastive.OfScores."""
        log_probability = scores.log_softmax(1)
        loss = -(weights * log_probability[:, 0]).sum()
        of_scores = log_probability.exp_()
        of_scores[:, 0] -= 1
        of_scores *= weights[:, None]
        return loss, of_scores

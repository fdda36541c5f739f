"""InfoNCE by plain autograd, as one would write it first: what the lean version is measured and tested against."""

import torch
import torch.nn.functional as F

from layerwise.objectives.contrastive import Draw


def plain_infonce(
    targets: torch.Tensor, contexts: torch.Tensor, predictors: torch.Tensor, draw: Draw
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and accuracy. targets (B, L, C), contexts (B, L, D), predictors (K, C, D); the draw of one whole batch."""
    device = targets.device
    rows_of_contexts = torch.as_tensor(draw.rows[draw.contexts], device=device)
    candidates = torch.as_tensor(draw.rows[draw.candidates], device=device)
    weights = torch.as_tensor(draw.weights, device=device)
    z = F.embedding(candidates, targets.flatten(0, 1))
    run = F.embedding(rows_of_contexts, contexts.flatten(0, 1))
    shifted = [
        run[step * draw.apart : step * draw.apart + z.shape[1]] @ predictor.t()
        for step, predictor in enumerate(predictors)
    ]
    if len(z) == 1:
        logits = z[0] @ torch.stack(shifted, dim=2)
    else:  # each step has its own
        logits = torch.cat([of_step @ predicted[:, :, None] for of_step, predicted in zip(z, shifted, strict=True)], 2)
    loss = (weights * -F.log_softmax(logits, dim=1)[:, 0]).sum()
    hits = logits[:, 0] > logits[:, 1:].amax(dim=1)
    return loss, (weights * hits).sum().detach()

"""Mean and deviation of channels, of more than is to be held at once in double precision."""

from collections.abc import Iterable

import torch


def mean_and_deviation(pieces: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [C] each, over all positions of all pieces (N, C, ...)."""
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        channels = piece.transpose(0, 1).flatten(1).double()
        count, total = count + channels.shape[1], total + channels.sum(1)
        squares = squares + channels.square().sum(1)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()

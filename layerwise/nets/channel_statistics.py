"""Mean and deviation of channels, by which a layer standardises what it reads."""

from collections.abc import Iterable

import torch


def take_statistics(
    mean: torch.Tensor, deviation: torch.Tensor, pieces: Iterable[torch.Tensor], smallest: float
) -> None:
    """Into [C] each, over all positions of all pieces (N, C, ...): more than is to be held at once in double precision.

    smallest: what is added to each deviation, by which a channel that never varies is divided then.
    """
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        channels = piece.transpose(0, 1).flatten(1).double()
        count, total = count + channels.shape[1], total + channels.sum(1)
        squares = squares + channels.square().sum(1)
    average = total / count
    mean.copy_(average)
    deviation.copy_((squares / count - average.square()).clamp(min=0).sqrt() + smallest)

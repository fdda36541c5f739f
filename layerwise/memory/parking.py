"""Takes tensors off the device while something else needs the room, and puts them back to the bit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from layerwise.memory.meter import uncounted


@contextmanager
def parked(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[None]:
    """The tensors lie in host memory inside the block, and on the device again behind it; meters count them as new."""
    away = list(tensors)
    with uncounted():
        hosts = [tensor.detach().to("cpu", copy=True) for tensor in away]
    for tensor in away:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=device)
    try:
        yield
    finally:
        for tensor, host in zip(away, hosts, strict=True):
            tensor.data = host.to(device, copy=True)


def repack(module: nn.Module) -> None:
    """Puts the weights of recurrent layers side by side again, as cuDNN wants them."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part.flatten_parameters()

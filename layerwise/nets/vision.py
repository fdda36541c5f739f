"""The paper's vision network: the first three modules of a ResNet-50, on patches (Löwe et al. 2019, appendix A.1).

Its layers are pre-activation bottleneck blocks without normalisation.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from layerwise.config import NetOptions
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network


def vision_network(net: NetOptions, channels_in: int) -> Network:
    """One layer per residual block; module m has net.blocks[m] blocks of width net.width * 2**m."""
    layers: list[Callable[[], Layer]] = [partial(Stem, channels_in, net.width, net.stem_stride)]
    channels_in = net.width * EXPANSION
    for module, blocks in enumerate(net.blocks):
        width = net.width * 2**module
        for block in range(blocks):
            if module == block == 0:
                continue
            stride = 2 if module > 0 and block == 0 else 1
            layers.append(partial(Bottleneck, channels_in, width, stride))
            channels_in = width * EXPANSION
    return Network(layers, natural_cut=net.blocks)


EXPANSION = 4
"""Output channels of a bottleneck per unit of its width (He et al. 2016, arXiv 1512.03385)."""


class Bottleneck(Layer):
    """1x1, 3x3, 1x1 convolutions with ReLU before each (He et al. 2016, arXiv 1603.05027), applied to every patch."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels = width * EXPANSION
        self.reduce = nn.Conv2d(channels_in, width, 1)
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)
        self.expand = nn.Conv2d(width, channels, 1)
        changes_shape = stride != 1 or channels_in != channels
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride) if changes_shape else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C, H, W) to (B, L, 4 width, H / stride, W / stride)."""
        patches = x.flatten(0, 1)
        y = self._bottleneck(patches)
        return y.unflatten(0, x.shape[:2])

    def _bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(x)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        y = F.relu_(self.reduce(active))
        y = F.relu_(self.conv(y))
        return self.expand(y).add_(shortcut)


class Stem(Bottleneck):
    """The 5x5 convolution at the bottom of the network and the first bottleneck block, which is never cut from it."""

    def __init__(self, channels_in: int, width: int, stem_stride: int) -> None:
        super().__init__(width, width, stride=1)
        self.stem = nn.Conv2d(channels_in, width, 5, stride=stem_stride, padding=2)

    def _bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        return super()._bottleneck(self.stem(x))

"""A convolutional network that reads whole pictures, and begins with patches of the pictures themselves.

Its lowest filters are whitened patches of equal contrast, and activations are centred over the filters, after Coates, Lee and
Ng (2011, "An analysis of single-layer networks in unsupervised feature learning"). What stands above are 3x3 convolutions of
standardised channels. No sample acts on another.
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.config import NetOptions
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network


def convnet(net: NetOptions, channels_in: int) -> Network:
    """One layer per convolution that is trained; module m has net.blocks[m] of them, of net.width * 2**m channels."""
    layers: list[Callable[[], Layer]] = [partial(Stem, channels_in, net.width)]
    channels = net.width
    for module, blocks in enumerate(net.blocks):
        width = net.width * 2**module
        for block in range(blocks):
            if module or block:
                layers.append(partial(MapConvolution, channels, width, halves=module > 0 and block == 0))
            channels = width
    return Network(layers, natural_cut=net.blocks)


class MapConvolution(Layer):
    """A 3x3 convolution of standardised channels, with an activation that is centred over its filters."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, channels_in: int, channels: int, halves: bool) -> None:
        """halves: whether a map becomes half as high and wide, while it has 8x8 places or more."""
        super().__init__()
        self.halves = halves
        weight = torch.randn(channels, channels_in, 3, 3)
        self.weight = nn.Parameter(weight / weight.flatten(1).norm(dim=1)[:, None, None, None])
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels_in))
        self.register_buffer("deviation", torch.ones(channels_in))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C, H, W) to (B, L, channels, H', W')."""
        return self.of_maps(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def of_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, channels, H', W')."""
        maps = (maps - self.mean[:, None, None]) / self.deviation[:, None, None]
        weight, bias = self.weight - self.weight.mean(0), self.bias - self.bias.mean()
        stride = 2 if self.halves and min(maps.shape[2:]) >= SMALLEST_HALVED else 1
        maps = maps.contiguous(memory_format=torch.channels_last)
        return F.relu_(F.conv2d(maps, weight.contiguous(memory_format=torch.channels_last), bias, stride, padding=1))

    def first_weights_from(self, x: torch.Tensor, rng: np.random.Generator) -> None:
        """Mean and deviation of the channels of maps (B, L, C, H, W)."""
        self.standardise(x.flatten(0, 1).split(AT_ONCE))

    def standardise(self, maps: Iterable[torch.Tensor]) -> None:
        """Brings the channels of such maps (N, C, H, W) to mean 0 and deviation 1."""
        count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for some in maps:
            channels = some.transpose(0, 1).flatten(1).double()
            count, total = count + channels.shape[1], total + channels.sum(1)
            squares = squares + channels.square().sum(1)
        mean = total / count
        self.mean.copy_(mean)
        self.deviation.copy_((squares / count - mean.square()).clamp(min=0).sqrt() + SMALLEST_DEVIATION)


SMALLEST_HALVED = 8
"""Places on a side."""

SMALLEST_DEVIATION = 1e-5


class Stem(MapConvolution):
    """Patches of 6x6 pixels as filters, which are not trained, their means over 5x5 places, and the first convolution."""

    filters: torch.Tensor
    shift: torch.Tensor

    side = 6
    pooled, every = 5, 3

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels, channels, halves=False)
        numbers = channels_in * self.side**2
        self.register_buffer("filters", F.normalize(torch.randn(channels, numbers)))
        self.register_buffer("shift", torch.zeros(channels))

    def of_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Pictures (N, C, H, W) to (N, channels, H', W')."""
        return super().of_maps(self._similar(maps))

    def first_weights_from(self, x: torch.Tensor, rng: np.random.Generator) -> None:
        """Whitened patches of the pictures (B, L, C, H, W), and what they make of the pictures."""
        pictures = x.flatten(0, 1)
        some = [
            _some_rows(_patches(few, self.side).flatten(0, 2), PATCHES * len(few) // len(pictures) + 1, rng)
            for few in pictures.split(AT_ONCE)
        ]
        patches = torch.cat(some).double()
        mean = patches.mean(0)
        values, directions = torch.linalg.eigh(torch.cov((patches - mean).T))
        whitening = directions * (values.clamp(min=0) + LEAST_VARIANCE).rsqrt() @ directions.T
        filters = F.normalize((_some_rows(patches, len(self.filters), rng) - mean) @ whitening) @ whitening
        self.filters.copy_(filters)
        self.shift.copy_(-filters @ mean)
        self.standardise(map(self._similar, pictures[: max(len(pictures) // 4, 1)].split(AT_ONCE)))

    def _similar(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, channels, H', W'): how much more alike a place is to a filter than to the others."""
        patches = _patches(pictures, self.side)
        filters, shift = self.filters - self.filters.mean(0), self.shift - self.shift.mean()
        similar = F.relu_(torch.addmm(shift, patches.flatten(0, 2), filters.T)).unflatten(0, patches.shape[:3])
        return F.avg_pool2d(similar.movedim(3, 1), self.pooled, self.every)


PATCHES = 50_000
"""Whose covariance is taken, and of which some become filters."""

AT_ONCE = 32
"""Pictures."""

FLAT = 0.002
"""Variance of a patch, in units of a picture's, below which its contrast is hardly raised."""

LEAST_VARIANCE = 0.1
"""What every direction of the patches has at least, before they are whitened."""


def _patches(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """(N, C, H, W) to patches of mean 0 and equal contrast (N, H', W', C * side * side)."""
    patches = pictures.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
    variance, mean = torch.var_mean(patches, dim=3, keepdim=True, unbiased=False)
    return patches.sub(mean).div_((variance + FLAT).sqrt_())


def _some_rows(rows: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """So many of (R, C), drawn; some of them more than once where there are fewer."""
    return rows[torch.from_numpy(rng.choice(len(rows), count, replace=len(rows) < count))]

"""A convolutional network that reads whole pictures, and begins with patches of the pictures themselves.

Its lowest filters are centres of whitened patches of equal contrast, and activations are centred over the filters, after
Coates, Lee and Ng (2011, "An analysis of single-layer networks in unsupervised feature learning"). What stands above are 3x3
convolutions of standardised channels, whose outputs lie beside what they read, as in DenseNet (Huang et al. 2017, arXiv
1608.06993): a module adds to what those below have found. No sample acts on another.
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.config import NetOptions
from layerwise.nets.channel_statistics import take_statistics
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network


def convnet(net: NetOptions, channels_in: int) -> Network:
    """One layer per convolution that is trained; module m has net.blocks[m] of them. Half as many filters of patches as
    net.width, up to MOST_FILTERS, and net.width channels more with each convolution."""
    patches = min(net.width // 2, MOST_FILTERS)
    layers: list[Callable[[], Layer]] = [partial(Stem, channels_in, patches, net.width, net.mirrored)]
    channels = patches + net.width
    for module, blocks in enumerate(net.blocks):
        for block in range(blocks):
            if module or block:
                layers.append(partial(MapConvolution, channels, net.width, halves=block == 0))
                channels += net.width
    return Network(layers, natural_cut=net.blocks)


class MapConvolution(Layer):
    """A 3x3 convolution of standardised channels, with an activation that is centred over its filters, beside its input."""

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
        """(B, L, C, H, W) to (B, L, C + channels, H', W')."""
        return self.of_maps(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def of_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C + channels, H', W')."""
        read = (maps - self.mean[:, None, None]) / self.deviation[:, None, None]
        weight, bias = self.weight - self.weight.mean(0), self.bias - self.bias.mean()
        read = read.contiguous(memory_format=torch.channels_last)
        found = F.relu_(F.conv2d(read, weight.contiguous(memory_format=torch.channels_last), bias, padding=1))
        if self.halves and min(maps.shape[2:]) >= SMALLEST_HALVED:
            # A stride of 2 takes a quarter of the time and had, with random weights, two points of error more. Zeros around
            # the map count in the means.
            maps, found = F.avg_pool2d(maps, 2, ceil_mode=True), F.avg_pool2d(found, 4, 2, padding=1, ceil_mode=True)
        return torch.cat([maps, found], 1)

    def first_weights_from(self, x: torch.Tensor, rng: np.random.Generator) -> None:
        """Mean and deviation of the channels of maps (B, L, C, H, W)."""
        self.standardise(x.flatten(0, 1).split(AT_ONCE))

    def standardise(self, maps: Iterable[torch.Tensor]) -> None:
        """Brings the channels of such maps (N, C, H, W) to mean 0 and deviation 1."""
        take_statistics(self.mean, self.deviation, maps, SMALLEST_DEVIATION)


SMALLEST_HALVED = 8
"""Places on a side."""

SMALLEST_DEVIATION = 1e-5
"""What a channel that never varies is divided by."""


class Stem(MapConvolution):
    """Patches of 6x6 pixels as filters, which are not trained, their means over 5x5 places, and the first convolution."""

    filters: torch.Tensor
    shift: torch.Tensor

    side = 6
    pooled, every = 5, 3

    def __init__(self, channels_in: int, patches: int, channels: int, mirrored: bool = False) -> None:
        """patches: filters that are not trained; mirrored: whether a picture and its mirror image give the same, the mean of
        both, standardised by pictures as they are."""
        super().__init__(patches, channels, halves=True)
        self.mirrored = mirrored
        filters = F.normalize(torch.randn(patches, channels_in * self.side**2))
        self.register_buffer("filters", filters - filters.mean(0))
        self.register_buffer("shift", torch.zeros(patches))

    def of_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Pictures (N, C, H, W) to (N, patches + channels, H', W')."""
        found = super().of_maps(self._similar(maps))
        if not self.mirrored:
            return found
        # Not mirrored back: which filter was found on which side would be lost, and with it all of the gain.
        return (found + super().of_maps(self._similar(maps.flip(3)))) / 2

    def first_weights_from(self, x: torch.Tensor, rng: np.random.Generator) -> None:
        """Centres of whitened patches of the pictures (B, L, C, H, W), and what they make of the pictures."""
        pictures = x.flatten(0, 1)
        some = [
            _some_rows(_patches(few, self.side).flatten(0, 2), PATCHES * len(few) // len(pictures) + 1, rng)
            for few in pictures.split(AT_ONCE)
        ]
        patches = torch.cat(some).double()
        mean = patches.mean(0)
        values, directions = torch.linalg.eigh(torch.cov((patches - mean).T))
        whitening = directions * (values.clamp(min=0) + LEAST_VARIANCE).rsqrt() @ directions.T
        filters = _centres((patches - mean) @ whitening, len(self.filters), rng) @ whitening
        filters -= filters.mean(0)
        shift = -filters @ mean
        self.filters.copy_(filters)
        self.shift.copy_(shift - THRESHOLD * torch.addmm(shift, patches, filters.T).std())
        self.standardise(map(self._similar, pictures[: max(len(pictures) // 4, 1)].split(AT_ONCE)))

    def _similar(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, patches, H', W'): how much more alike a place is to a filter than to the others.

        As the product of filters and patches of mean 0 and equal contrast, which are not made.
        """
        filters = self.filters.unflatten(1, (-1, self.side, self.side))
        centred = (filters - filters.mean((1, 2, 3), keepdim=True)).contiguous(memory_format=torch.channels_last)
        # A program that is exported takes any number of pictures, and torch.export would fix that of the pieces.
        pieces = [pictures] if torch.compiler.is_exporting() else pictures.split(AT_ONCE)
        with torch.autocast(
            "cuda" if pictures.is_cuda else "cpu", enabled=False
        ):  # contrast is a difference of near numbers
            return torch.cat([self._products(some.float(), centred) for some in pieces])

    def _products(self, pictures: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        """filters (patches, C, side, side)."""
        # In float64, for contrasts that are low beside the level.
        exact = pictures.double()
        mean, squares = (_means_over(x.mean(1, keepdim=True), self.side) for x in (exact, exact.square()))
        contrast = (squares - mean.square()).clamp_(min=0).add_(FLAT).sqrt_().float()
        products = F.conv2d(pictures.contiguous(memory_format=torch.channels_last), filters)
        similar = F.relu_(products.div_(contrast).add_(self.shift[:, None, None]))
        return F.avg_pool2d(similar, self.pooled, self.every)


MOST_FILTERS = 128
"""Of patches: more of them bring nothing below a wide convolution."""

PATCHES = 50_000
"""Whose covariance is taken, and whose centres become filters."""

AT_ONCE = 32
"""Pictures of which all places are compared with all filters: many more would no longer lie in the caches of a CPU."""

FLAT = 0.002
"""Variance of a patch, in units of a picture's, below which its contrast is hardly raised."""

ROUNDS = 8
"""In which centres are moved."""

THRESHOLD = 0.5
"""Part of the deviation of similarities by which a place must be more alike to a filter than to the mean of all."""

LEAST_VARIANCE = 0.1
"""What every direction of the patches has at least, before they are whitened."""


def _means_over(maps: torch.Tensor, side: int) -> torch.Tensor:
    """(N, 1, H, W) to the means over each square of so many places a side, (N, 1, H', W').

    As average pooling, which onnxruntime has not in float64.
    """
    return maps.unfold(2, side, 1).mean(-1).unfold(3, side, 1).mean(-1)


def _patches(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """(N, C, H, W) to patches of mean 0 and equal contrast (N, H', W', C * side * side)."""
    patches = pictures.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
    variance, mean = torch.var_mean(patches, dim=3, keepdim=True, unbiased=False)
    return patches.sub(mean).div_((variance + FLAT).sqrt_())


def _centres(points: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Directions [count, C] among those of the points (P, C): each that of the mean of the points that it is nearest to.

    Spherical k-means (Coates and Ng 2012, "Learning feature representations with k-means", section 3).
    """
    directions = F.normalize(points)
    centres = _some_rows(directions, count, rng)
    for _ in range(ROUNDS):
        nearest = (directions @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        missed = sums.norm(dim=1) == 0
        centres = F.normalize(torch.where(missed[:, None], _some_rows(points, count, rng), sums))
    return centres


def _some_rows(rows: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """So many of (R, C), drawn; some of them more than once where there are fewer."""
    return rows[torch.from_numpy(rng.choice(len(rows), count, replace=len(rows) < count))]

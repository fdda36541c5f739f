"""Whole samples rendered anew, after SimCLR (Chen et al. 2020, arXiv 2002.05709, appendix A): a crop that is resized back,
another contrast, brightness and colour, and noise. In one, two or three dimensions alike."""

import numpy as np
import torch
import torch.nn.functional as F

AREA = (0.3, 1.0)
"""Part of the sample that a crop holds. SimCLR begins at 0.08, for pictures of a larger scene."""

STRETCH = (3 / 4, 4 / 3)
"""By which one side of a crop may be longer than another."""

CHANGE = 0.4
"""Most by which the contrast, the brightness (in standard deviations) and the level of one channel change."""

GREY = 0.2
"""Part of colour pictures that lose their colour."""

NOISE = 0.05
"""Of the sample's standard deviation."""

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def cropped(sample: torch.Tensor, flip: bool, rng: np.random.Generator) -> torch.Tensor:
    """Another rendering of a sample (C, *space) of one to three spatial dimensions, or of none: float32 of the same shape.

    flip: whether it may be mirrored along its last dimension.
    """
    x, space = sample.float(), sample.shape[1:]
    if 1 <= len(space) <= 3:
        x = _resized(x[_crop(space, rng)], space)
    if space and flip and rng.random() < 0.5:
        x = x.flip(-1)
    return _recoloured(x, rng)


def _crop(space: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, ...]:
    part = rng.uniform(*AREA) ** (1 / len(space))
    stretches = np.exp(rng.uniform(np.log(STRETCH[0]), np.log(STRETCH[1]), len(space)) / 2)
    sizes = [max(min(round(size * part * float(by)), size), 1) for size, by in zip(space, stretches, strict=True)]
    firsts = [int(rng.integers(0, size - length + 1)) for size, length in zip(space, sizes, strict=True)]
    return (slice(None), *(slice(first, first + length) for first, length in zip(firsts, sizes, strict=True)))


def _resized(x: torch.Tensor, space: tuple[int, ...]) -> torch.Tensor:
    return F.interpolate(x[None], size=tuple(space), mode=INTERPOLATION[len(space)], align_corners=False)[0]


def _recoloured(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    mean, deviation = x.mean(), x.std(unbiased=False)
    contrast, brightness = rng.uniform(-CHANGE, CHANGE, 2).tolist()
    x = (x - mean) * (1 + contrast) + mean + brightness * deviation
    if len(x) == 3 and x.dim() == 3 and rng.random() < GREY:
        x = x.mean(0, keepdim=True).expand_as(x)
    channels = torch.from_numpy(rng.uniform(-CHANGE / 2, CHANGE / 2, len(x)).astype(np.float32))
    x = x + deviation * channels.reshape(-1, *[1] * (x.dim() - 1))
    return x + NOISE * deviation * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))

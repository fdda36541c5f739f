"""Another form of a data set: in frames of several steps, or in more renderings (views) of each sample.

Renderings are cached side by side: upper stages then see other inputs from one epoch to the next. A rendering is a function
of the sample's id and the view alone: any part of it can be read by itself. Recordings get another tilt of their spectrum and
noise. Pictures are shifted by some pixels, up to half the way from one patch to the next: their patches, of which caches are
made, then hold other pixels. Other frames get another level and contrast. View 0 stays plain, and so do the views that the data
have themselves, such as the mirrored one.

Samples that are read whole are rendered after SimCLR (Chen et al. 2020, arXiv 2002.05709, appendix A): a crop that is resized
back, another contrast, brightness and colour, and noise. In one, two or three dimensions alike.
"""

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from layerwise.data.batches import stream
from layerwise.data.source import Crops, DataSet, digest, pixels_apart

NOISE_BLOCK = 4096
"""Samples of audio whose noise is drawn at once."""

TILT = 0.4
"""Most that a sample before is added or taken away."""

NOISE_DB = (15, 35)
"""Noise below the level of the set."""

CONTRAST = 0.3
"""Most by which contrast and brightness change, in standard deviations."""


class Derived:
    """A data set made of another one, which it equals in all that it does not define itself."""

    def __init__(self, data: DataSet, how: str) -> None:
        """how: in words that tell it from others made of the same data."""
        self._data = data
        self.identity = digest(f"{data.identity} in {how}")

    @property
    def level(self) -> float:
        """What values are divided by."""
        return self._data.level

    @level.setter
    def level(self, level: float) -> None:
        self._data.level = level

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        return getattr(self._data, name)


class Framed(Derived):
    """A data set of steps in frames of `length` steps, one every `step` steps.

    Steps of shape (C, *rest) make frames of shape (C, length, *rest).
    """

    def __init__(self, data: DataSet, length: int, step: int) -> None:
        super().__init__(data, f"frames of {length} every {step}")
        self._length, self._step = length, step
        self.lengths = np.maximum((data.lengths - length) // step + 1, 0)
        self.frame_shape = (data.frame_shape[0], length, *data.frame_shape[1:])

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample."""
        if start == stop:
            return torch.empty(0, *self.frame_shape)
        steps = self._data.read(sample, start * self._step, (stop - 1) * self._step + self._length, view)
        return in_frames(steps[None], self._length, self._step)[0]

    def frame_labels(self, name: str, sample: int, positions: np.ndarray) -> np.ndarray:
        """Those of the step in the middle of each frame."""
        return self._data.frame_labels(name, sample, positions * self._step + (self._length - 1) / 2)


def in_frames(steps: torch.Tensor, length: int, step: int) -> torch.Tensor:
    """Steps (B, L, C, *rest) to frames (B, L', C, length, *rest)."""
    return steps.unfold(1, length, step).movedim(-1, 3)


class WithViews(Derived):
    """A data set in another number of views."""

    def __init__(self, data: DataSet, views: int, whole: bool = False, flip: bool = False) -> None:
        """whole: samples are single frames, which may be cropped, and mirrored where `flip` allows it."""
        self._shifts = views > data.views and pixels_apart(data) > 1
        how = ", shifted" if self._shifts else f", whole, flip {flip}" if whole else ""
        super().__init__(data, f"{views} views{how}")
        self.views, self._whole, self._flip = views, whole, flip

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample, as the data themselves give them, rendered."""
        data = self._data
        if view < data.views:
            return data.read(sample, start, stop, view)
        base, rng = view % data.views, stream(0, "view", view, data.ids[sample])
        if self._whole and start < stop:
            return cropped(data.read(sample, start, stop, base)[0], self._flip, rng)[None]
        if self._shifts:
            return self.read_crop(sample, 0, 0, (data.columns, data.columns), view)[start:stop]
        if len(data.frame_shape) == 1:
            before = min(start, 1)
            return self._recording(data.read(sample, start - before, stop, base), before, rng, sample, start, view)
        contrast, brightness = rng.uniform(-CONTRAST, CONTRAST, 2).tolist()
        return data.read(sample, start, stop, base) * (1 + contrast) + brightness

    def read_crop(self, sample: int, top: int, left: int, side: tuple[int, int], view: int = 0) -> torch.Tensor:
        """A part of a picture that is rendered: see `Crops`."""
        pictures, base = cast(Crops, self._data), view % self._data.views
        if view != base:
            apart, rng = pictures.pixels_apart, stream(0, "view", view, self._data.ids[sample])
            down, right = (rng.integers(0, apart, 2) - apart // 2).tolist()
            top, left = top + down, left + right
        return pictures.read_crop(sample, top, left, side, base)

    def _recording(
        self, frames: torch.Tensor, before: int, rng: np.random.Generator, sample: int, start: int, view: int
    ) -> torch.Tensor:
        """Adds a part of the frame before to every frame, and noise. frames: with `before` more in front."""
        tilt, decibels = rng.uniform(-TILT, TILT), rng.uniform(*NOISE_DB)
        previous = frames[:-1] if before else torch.cat([torch.zeros_like(frames[:1]), frames[:-1]])
        frames = frames[before:]
        noise = self._noise(sample, start, len(frames), view).reshape(len(frames), *[1] * (frames.dim() - 1))
        return frames + tilt * previous + 10 ** (-decibels / 20) * noise

    def _noise(self, sample: int, start: int, count: int, view: int) -> torch.Tensor:
        """float32 [count]: the same number at the same place, however it is read."""
        first, last = start // NOISE_BLOCK, (start + max(count, 1) - 1) // NOISE_BLOCK
        blocks = [
            stream(0, "noise", view, self._data.ids[sample], block).standard_normal(NOISE_BLOCK, dtype=np.float32)
            for block in range(first, last + 1)
        ]
        return torch.from_numpy(np.concatenate(blocks)[start - first * NOISE_BLOCK :][:count])


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
        mode = INTERPOLATION[len(space)]
        x = F.interpolate(x[_crop(space, rng)][None], size=tuple(space), mode=mode, align_corners=False)[0]
    if space and flip and rng.random() < 0.5:
        x = x.flip(-1)
    return _recoloured(x, rng)


def _crop(space: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, ...]:
    part = rng.uniform(*AREA) ** (1 / len(space))
    stretches = np.exp(rng.uniform(np.log(STRETCH[0]), np.log(STRETCH[1]), len(space)) / 2)
    sizes = [max(min(round(size * part * float(by)), size), 1) for size, by in zip(space, stretches, strict=True)]
    firsts = [int(rng.integers(0, size - length + 1)) for size, length in zip(space, sizes, strict=True)]
    return (slice(None), *(slice(first, first + length) for first, length in zip(firsts, sizes, strict=True)))


def _recoloured(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    mean, deviation = x.mean(), x.std(unbiased=False)
    contrast, brightness = rng.uniform(-CHANGE, CHANGE, 2).tolist()
    x = (x - mean) * (1 + contrast) + mean + brightness * deviation
    if len(x) == 3 and x.dim() == 3 and rng.random() < GREY:
        x = x.mean(0, keepdim=True).expand_as(x)
    channels = torch.from_numpy(rng.uniform(-CHANGE / 2, CHANGE / 2, len(x)).astype(np.float32))
    x = x + deviation * channels.reshape(-1, *[1] * (x.dim() - 1))
    return x + NOISE * deviation * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))

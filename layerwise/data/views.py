"""More renderings of each sample, cached side by side: upper stages then see other inputs from one epoch to the next.

A rendering is a function of the sample's id and the view alone, and of single samples of audio or single pixels: any part
of it can be read by itself. Recordings get another tilt of their spectrum and noise, pictures another brightness and
contrast. View 0 stays plain, and so do the views that the data have themselves, such as the mirrored one. Samples that are
read whole are cropped as well, see `data.crops`.
"""

import hashlib
from typing import Any

import numpy as np
import torch

from layerwise.data.crops import cropped
from layerwise.data.source import DataSet
from layerwise.streams import stream

NOISE_BLOCK = 4096
"""Samples of audio whose noise is drawn at once."""

TILT = 0.4
"""Most that a sample before is added or taken away."""

NOISE_DB = (15, 35)
"""Noise below the level of the set."""

CONTRAST = 0.3
"""Most by which contrast and brightness change, in standard deviations."""


class WithViews:
    """A data set in another number of views."""

    def __init__(self, data: DataSet, views: int, whole: bool = False, flip: bool = False) -> None:
        """whole: samples are single frames, which may be cropped, and mirrored where `flip` allows it."""
        self._data, self.views, self._whole, self._flip = data, views, whole, flip
        kind = f", whole, flip {flip}" if whole else ""
        self.identity = hashlib.sha256(f"{data.identity} in {views} views{kind}".encode()).hexdigest()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        return getattr(self._data, name)

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample, as the data themselves give them, rendered."""
        data = self._data
        if view < data.views:
            return data.read(sample, start, stop, view)
        base, rng = view % data.views, stream(0, "view", view, data.ids[sample])
        if self._whole and start < stop:
            return cropped(data.read(sample, start, stop, base)[0], self._flip, rng)[None]
        if len(data.frame_shape) == 1:
            before = min(start, 1)
            return self._recording(data.read(sample, start - before, stop, base), before, rng, sample, start, view)
        contrast, brightness = rng.uniform(-CONTRAST, CONTRAST, 2).tolist()
        return data.read(sample, start, stop, base) * (1 + contrast) + brightness

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

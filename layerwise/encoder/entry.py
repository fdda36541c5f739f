"""From what a user holds, waveforms, pictures or arrays, to the frames that the network reads: as the run's data were read."""

from typing import Any

import numpy as np
import torch
from torch import nn

from layerwise.cache.feature_formats import RowPlaces
from layerwise.config import DataOptions
from layerwise.data.images import cut_patches, mean_and_deviation, patch_options
from layerwise.data.views import in_frames
from layerwise.errors import DataError
from layerwise.nets.module import Geometry


class Entry(nn.Module):
    """The way into an encoder: from a batch of samples to frames (B, L, *frame shape)."""

    takes: str = "arrays"
    """The name of its input."""
    ragged: bool = False
    """Whether samples of several lengths may share a batch."""
    frame_shape: tuple[int, ...]
    level: float = 1.0
    """What the run's data were divided by."""
    geometry: Geometry = Geometry()
    """Of the frames on the steps of the input."""

    def frames_of(self, steps: Any) -> Any:
        """Frames that come of so many steps of a sequence, or patches (an int or an int64 array)."""
        return steps

    wanted: str
    """Words on what a batch must be."""

    def fits(self, x: torch.Tensor) -> bool:
        """Whether x is such a batch."""
        raise NotImplementedError

    def check(self, x: torch.Tensor) -> None:
        """Raises DataError, saying what would be right, where x is no such batch."""
        if not self.fits(x):
            dtype = str(x.dtype).removeprefix("torch.")
            raise DataError(f"The encoder got {dtype} of shape {tuple(x.shape)}; give {self.wanted}.")

    def sizes(self, shortest: int, hop: int) -> list[tuple[int, ...]]:
        """Three batches to try an encoder with, that of the run first.

        shortest: fewest steps that it needs; hop: steps between its features.
        """
        raise NotImplementedError


class Steps(Entry):
    """Sequences (B, L, C, *rest) at the level of the run's data, in frames of several steps where the run had such."""

    ragged = True

    def __init__(self, data: DataOptions, level: float, frame_shape: tuple[int, ...]) -> None:
        """frame_shape: as the network reads it."""
        super().__init__()
        self.level, self.frame_shape, self.window = level, frame_shape, data.window
        self.length, self.step = data.frame_length, data.frame_step or data.frame_length
        self.framed = self.length > 1 or self.step > 1
        self.step_shape = (frame_shape[0], *frame_shape[2:]) if self.framed else frame_shape
        self.geometry = Geometry(self.step, (self.length - 1) / 2)
        self.wanted = f"floats (B, steps, {', '.join(map(str, self.step_shape))})"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / self.level
        return in_frames(x, self.length, self.step) if self.framed else x

    def frames_of(self, steps: Any) -> Any:
        return np.maximum((steps - self.length) // self.step + 1, 0)

    def fits(self, x: torch.Tensor) -> bool:
        return x.dim() >= 3 and tuple(x.shape[2:]) == self.step_shape and x.is_floating_point()

    def sizes(self, shortest: int, hop: int) -> list[tuple[int, ...]]:
        window = (self.window - 1) * self.step + self.length
        lengths = (2, window), (1, window + 3 * hop + 1), (3, max(window // 2, shortest))
        return [(batch, length, *self.step_shape) for batch, length in lengths]


class Waveforms(Steps):
    """(B, samples) to (B, samples, 1), or to frames, at the level of the run's recordings; see data/speech.py."""

    takes = "waveforms"

    def __init__(self, data: DataOptions, level: float, frame_shape: tuple[int, ...] = (1,)) -> None:
        super().__init__(data, level, frame_shape)
        self.rate = data.sample_rate
        self.wanted = (
            f"waveforms (B, samples) of floats from -1 to 1 at {self.rate} Hz, one channel: waveform[None] makes a batch "
            "of one"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., None])

    def fits(self, x: torch.Tensor) -> bool:
        return x.dim() == 2 and x.is_floating_point()

    def sizes(self, shortest: int, hop: int) -> list[tuple[int, ...]]:
        return [size[:2] for size in super().sizes(shortest, hop)]


class Whole(Entry):
    """Whole samples (B, C, *space) at the level of the run's data, each of them one frame."""

    def __init__(self, level: float, frame_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.level, self.frame_shape = level, frame_shape
        self.wanted = f"floats (B, {', '.join(map(str, frame_shape))})"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / self.level)[:, None]

    def fits(self, x: torch.Tensor) -> bool:
        return tuple(x.shape[1:]) == self.frame_shape and x.is_floating_point()

    def sizes(self, shortest: int, hop: int) -> list[tuple[int, ...]]:
        return [(batch, *self.frame_shape) for batch in (2, 1, 3)]


class Pictures(Entry):
    """(B, C, H, W), uint8 or floats from 0 to 1, to normalised patches (B, L, C, patch, patch); see data/images.py.

    L is rows times columns of the grid; what the last patches leave over at the right and the bottom is not looked at. Of
    whole pictures there is one patch.
    """

    takes = "pictures"
    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, data: DataOptions) -> None:
        super().__init__()
        options = patch_options(data)
        self.channels, self.patch, self.stride = options.channels, options.patch, options.patch_stride
        self.picture, self.whole = data.picture, data.frames == "whole"
        self.frame_shape = (self.channels, self.patch, self.patch)
        for name, constant in zip(("mean", "deviation"), mean_and_deviation(self.channels), strict=True):
            self.register_buffer(name, constant, persistent=False)
        kind, least = "grey" if self.channels == 1 else "colour", "" if self.whole else "at least "
        self.wanted = (
            f"{kind} pictures (B, {self.channels}, H, W) of {least}{self.patch} x {self.patch} pixels, as uint8 or as floats "
            "from 0 to 1"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x if x.is_floating_point() else x / 255
        normal = (values - self.mean) / self.deviation
        return normal[:, None] if self.whole else cut_patches(normal, self.patch, self.stride)

    def fits(self, x: torch.Tensor) -> bool:
        if x.dim() != 4 or x.shape[1] != self.channels or not (x.is_floating_point() or x.dtype == torch.uint8):
            return False
        return tuple(x.shape[2:]) == (self.patch, self.patch) if self.whole else min(x.shape[2:]) >= self.patch

    def check(self, x: torch.Tensor) -> None:
        super().check(x)
        if x.is_floating_point() and x.numel() and x.max() > 2:  # interpolation may overshoot 1, and no more
            raise DataError(
                f"The encoder got pixels of up to {x.max().item():g}; give floats from 0 to 1, or uint8: .to(torch.uint8)."
            )

    def sizes(self, shortest: int, hop: int) -> list[tuple[int, ...]]:
        side, stride = self.picture, 0 if self.whole else self.stride
        odd = 0 if self.whole else 1
        return [
            (2, self.channels, side, side),
            (1, self.channels, side + stride, side),
            (3, self.channels, side, side + 2 * stride + odd),
        ]


def row_places(data: DataOptions, takes: str, hop: int, offset: float) -> RowPlaces | None:
    """Where the features of a sample lie on it; None where it has one row of them.

    takes: what the encoder takes, see `DataSet`. hop, offset: of the features on the frames that the network reads. Patches
    lie on the picture as it was resized and cropped.
    """
    if data.frames == "whole":
        return None
    if takes == "pictures":
        options = patch_options(data)
        return RowPlaces(options.patch_stride, (options.patch - 1) / 2, "pixels", options.columns)
    step = data.frame_step or data.frame_length
    hop, offset = step * hop, (data.frame_length - 1) / 2 + step * offset
    if takes == "waveforms":
        return RowPlaces(hop / data.sample_rate, offset / data.sample_rate, "seconds")
    return RowPlaces(hop, offset, "steps")

"""From what a user holds, waveforms or pictures, to the frames that the network reads: as the run's data were read."""

from typing import Protocol

import torch
from torch import nn

from layerwise.config import DataOptions
from layerwise.data.images import cut_patches, mean_and_deviation
from layerwise.errors import DataError


class Entry(Protocol):
    """The way into an encoder, an nn.Module."""

    frame_shape: tuple[int, ...]
    takes: str
    """The name of its input."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The frames (B, L, *frame shape) of a batch."""
        ...

    def check(self, x: torch.Tensor) -> None:
        """Raises DataError, saying what would be right, where x is no such batch."""
        ...


class Waveforms(nn.Module):
    """(B, samples) to (B, samples, 1), at the level of the run's recordings; see data/speech.py."""

    frame_shape: tuple[int, ...] = (1,)
    takes: str = "waveforms"

    def __init__(self, data: DataOptions, level: float) -> None:
        super().__init__()
        self.rate, self.level = data.sample_rate, level

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., None] / self.level

    def check(self, x: torch.Tensor) -> None:
        if x.dim() != 2 or not x.is_floating_point():
            raise DataError(
                f"The encoder got {_described(x)}; give waveforms (B, samples) of floats from -1 to 1 at {self.rate} Hz, one "
                "channel: waveform[None] makes a batch of one."
            )


class Pictures(nn.Module):
    """(B, C, H, W), uint8 or floats from 0 to 1, to normalised patches (B, L, C, patch, patch); see data/images.py.

    L is rows times columns of the grid; what the last patches leave over at the right and the bottom is not looked at.
    """

    takes: str = "pictures"
    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, data: DataOptions) -> None:
        super().__init__()
        self.channels, self.patch, self.stride = 1 if data.gray else 3, data.patch, data.patch_stride
        self.frame_shape: tuple[int, ...] = (self.channels, data.patch, data.patch)
        for name, constant in zip(("mean", "deviation"), mean_and_deviation(self.channels), strict=True):
            self.register_buffer(name, constant, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x if x.is_floating_point() else x / 255
        return cut_patches((values - self.mean) / self.deviation, self.patch, self.stride)

    def check(self, x: torch.Tensor) -> None:
        kind = "grey" if self.channels == 1 else "colour"
        fits = x.dim() == 4 and x.shape[1] == self.channels and min(x.shape[2:]) >= self.patch
        if not fits or not (x.is_floating_point() or x.dtype == torch.uint8):
            raise DataError(
                f"The encoder got {_described(x)}; give {kind} pictures (B, {self.channels}, H, W) of at least "
                f"{self.patch} x {self.patch} pixels, as uint8 or as floats from 0 to 1."
            )
        if x.is_floating_point() and x.numel() and x.max() > 2:  # interpolation may overshoot 1, and no more
            raise DataError(
                f"The encoder got pixels of up to {x.max().item():g}; give floats from 0 to 1, or uint8: .to(torch.uint8)."
            )


def _described(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"

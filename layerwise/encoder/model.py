"""The stitched encoder as one nn.Module, from waveforms or pictures to features."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from layerwise.encoder.entry import Entry
from layerwise.errors import DataError
from layerwise.nets.layer import Layer, mask_padding, vectors
from layerwise.nets.module import Geometry, Module


class Encoder(nn.Module):
    """All stages of a run, one after another, in float32. Its weights bear the names they have in encoder.safetensors."""

    def __init__(self, entry: Entry, modules: Sequence[Module]) -> None:
        super().__init__()
        self.entry = entry
        named = nn.ModuleDict({name: layer for module in modules for name, layer in module.layers.items()})
        self.layers = cast(Mapping[str, Layer], named)  # it does not tell its type checker what it holds
        self.shortest = next(length for length in count(1) if self.out_length(length) >= 1)
        """Fewest samples of a waveform, steps of a sequence, or patches, that give a frame of features."""
        self._stage_ends = np.cumsum([len(module.layers) for module in modules]).tolist()

    def forward(self, x: torch.Tensor, lengths: Any = None) -> torch.Tensor:
        """The features of the last stage: (B, L, C), one vector per frame.

        x: waveforms (B, samples) of floats from -1 to 1 at the run's sample rate; pictures (B, C, H, W), uint8 or from 0 to 1;
        or arrays as the run read them, (B, steps, C, ...) or whole samples (B, C, ...). lengths: int [B], steps of each
        sequence in a padded batch; its features are then those that it has alone, and zero from `out_length` on. Raises
        DataError where x or lengths do not fit.
        """
        for frames in self._stages(x, lengths):
            features = frames
        return vectors(features)

    def stages(self, x: torch.Tensor, lengths: Any = None) -> list[torch.Tensor]:
        """What each stage puts out, as it is cached: `(B, L, *frame)`. Where frames are pictures, `forward` averages them."""
        return list(self._stages(x, lengths))

    def out_length(self, length: Any) -> Any:
        """Frames of features that come of so many samples of a waveform, steps, or patches (an int or an int64 array)."""
        length = self.entry.frames_of(length)
        for layer in self.layers.values():
            length = layer.out_length(length)
        return length

    @property
    def geometry(self) -> Geometry:
        """Where the frames of features lie: frame t is centred on sample hop * t + offset of the waveform, or on that step."""
        geometry = self.entry.geometry
        for layer in self.layers.values():
            geometry = geometry.after(layer)
        return geometry

    def frames_of_stages(self, frames: torch.Tensor, lengths: np.ndarray | None = None) -> Iterator[torch.Tensor]:
        """What each stage puts out, one at a time, for frames `(B, L, *frame shape)` behind the entry.

        lengths: int64 [B], frames of each sample where others are padding.
        """
        for number, layer in enumerate(self.layers.values(), start=1):
            frames = layer(frames)
            if lengths is not None:
                lengths = layer.out_length(lengths)
                frames = mask_padding(frames, lengths)
            if number in self._stage_ends:
                yield frames

    def _stages(self, x: torch.Tensor, lengths: Any) -> Iterator[torch.Tensor]:
        if not isinstance(x, torch.Tensor):
            raise DataError(f"The encoder got a {type(x).__name__}; give a tensor: torch.from_numpy(array).")
        self.entry.check(x)
        if self.entry.ragged and x.shape[1] < self.shortest:
            what = "Waveforms" if self.entry.takes == "waveforms" else "Sequences"
            raise DataError(f"{what} of {x.shape[1]} samples are too short; the encoder needs {self.shortest}.")
        if lengths is None:
            return self.frames_of_stages(self.entry(x))
        lengths = self.entry.frames_of(self._checked(lengths, x))
        return self.frames_of_stages(mask_padding(self.entry(x), lengths), lengths)

    def _checked(self, lengths: Any, x: torch.Tensor) -> np.ndarray:
        """Lengths as int64 [B]."""
        if not self.entry.ragged:
            raise DataError("Pictures of a batch have one size, so lengths mean nothing for them; leave them out.")
        lengths = np.asarray(lengths.cpu() if isinstance(lengths, torch.Tensor) else lengths)
        whole = np.issubdtype(lengths.dtype, np.integer)
        if not whole or lengths.shape != (len(x),) or lengths.min() < self.shortest or lengths.max() > x.shape[1]:
            raise DataError(
                f"lengths {lengths.tolist()} do not fit; give a whole number for each of the {len(x)} {self.entry.takes}, from "
                f"the {self.shortest} samples that the encoder needs to the {x.shape[1]} of the batch."
            )
        return lengths.astype(np.int64)

"""What a probe sees of a sample: the mean over its frames, or single frames where the label is per frame."""

from dataclasses import dataclass, field

import numpy as np
import torch

from layerwise.cache import ActivationCache
from layerwise.data.batches import stream
from layerwise.evaluate.examples import FeatureRows, Poll
from layerwise.memory.meter import host_tensor, uncounted
from layerwise.nets.layer import vectors

FRAMES_PER_SAMPLE = 32
"""Most frames of a sample that a per-frame probe sees; enough for a stable error and bounded memory."""

READ_FRAMES = 65_536
"""Frames that are read from a cache at once."""


@dataclass(slots=True)
class SampleSummary:
    """Takes the frames of one sample, piece by piece, and keeps their mean and the chosen ones."""

    chosen: np.ndarray
    """Sorted int64 [F], the frames to keep."""
    frames: int = 0
    total: torch.Tensor | None = None
    kept: list[torch.Tensor] = field(default_factory=list)

    def add(self, frames: torch.Tensor) -> None:
        """The next frames [n, *frame shape] of the sample."""
        if not len(frames):
            return
        piece = vectors(frames[None].float())[0]
        self.total = piece.sum(0) if self.total is None else self.total + piece.sum(0)
        here = self.chosen[(self.chosen >= self.frames) & (self.chosen < self.frames + len(frames))] - self.frames
        kept = piece[host_tensor(here).to(piece.device)]
        with uncounted():
            self.kept.append(kept.to("cpu", copy=True))
        self.frames += len(frames)

    def features(self, per_frame: bool) -> np.ndarray:
        """float32 [1, C], or [F, C] where per_frame."""
        return self.chosen_frames if per_frame else self.mean[None]

    @property
    def mean(self) -> np.ndarray:
        """float32 [C]"""
        assert self.total is not None
        return (self.total / self.frames).cpu().numpy()

    @property
    def chosen_frames(self) -> np.ndarray:
        """float32 [F, C]"""
        return torch.cat(self.kept).numpy()


def choose_frames(sample: int, length: int, per_frame: bool) -> np.ndarray:
    """The frames of a sample that a per-frame probe sees, the same for every encoder; none for other probes."""
    if not per_frame:
        return np.zeros(0, dtype=np.int64)
    count = min(length, FRAMES_PER_SAMPLE)
    return np.sort(stream(0, "probe frames", sample).choice(length, count, replace=False))


def cached_features(
    cache: ActivationCache, samples: np.ndarray, per_frame: bool, into: FeatureRows, poll: Poll = lambda: None
) -> None:
    """Features of the samples from a cache, in their order: a row each, or one per chosen frame where per_frame.

    `poll` is called before each sample and may raise.
    """
    for sample in samples.tolist():
        poll()
        length = int(cache.lengths[sample])
        summary = SampleSummary(choose_frames(sample, length, per_frame))
        for start in range(0, length, READ_FRAMES):
            summary.add(cache.read(sample, start, min(start + READ_FRAMES, length)))
        into.append(summary.features(per_frame))

"""One vector per sample: the mean over its frames."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Pool:
    """B samples of a padded batch, one after another, whose real frames are averaged."""

    frames: int
    """Frames of the padded batch."""
    first: int
    """The first of the samples."""
    lengths: np.ndarray
    """float32 [B], real frames of each, at least 1."""

    @classmethod
    def of(cls, lengths: np.ndarray, frames: int, samples: np.ndarray) -> "Pool":
        """Of neighbouring samples, int64 [B], in a batch with int64 lengths padded to so many frames."""
        return cls(frames, int(samples[0]), np.maximum(lengths[samples], 1).astype(np.float32))


def real_rows(lengths: np.ndarray, frames: int, samples: np.ndarray) -> np.ndarray:
    """int64 [R], sorted: all real frames of neighbouring samples, numbered b * frames + t over the padded batch."""
    sample, frame = np.nonzero(np.arange(frames) < lengths[samples][:, None])
    return (samples[0] + sample) * frames + frame


def pooled(vectors: torch.Tensor, rows: np.ndarray, pool: Pool) -> torch.Tensor:
    """vectors (R, C) of these rows to means (B, C), in float32 at least."""
    device, dtype = vectors.device, torch.promote_types(vectors.dtype, torch.float32)
    sample = torch.as_tensor(rows // pool.frames - pool.first, device=device)
    total = torch.zeros(len(pool.lengths), vectors.shape[1], dtype=dtype, device=device)
    return total.index_add(0, sample, vectors.to(dtype)) / torch.as_tensor(pool.lengths, device=device)[:, None]

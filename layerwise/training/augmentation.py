"""Noise on the inputs of a stage and dropped frames, drawn anew for every step.

The inputs of a stage above the first never change while it trains, as they do where all modules train at once, so it may
learn them by heart. What is added here is drawn on the host, before the batch is sliced: slices do not act on it.
"""

from dataclasses import replace

import numpy as np
import torch

from layerwise.config import TrainingOptions
from layerwise.data.batches import Batch
from layerwise.memory.meter import uncounted


def augmented(batch: Batch, options: TrainingOptions, rng: np.random.Generator) -> Batch:
    """The batch with `input_noise` and `frame_dropout`; padding stays zero."""
    if not options.input_noise and not options.frame_dropout:
        return batch
    with uncounted():
        frames = batch.frames.float()
        real = torch.from_numpy(np.arange(frames.shape[1]) < batch.lengths[:, None])
        kept = real & torch.from_numpy(rng.random(real.shape) >= options.frame_dropout)
        if options.input_noise:
            level = options.input_noise * frames[real].square().mean().sqrt()
            frames = frames + level * torch.from_numpy(rng.standard_normal(frames.shape, dtype=np.float32))
        frames = frames * kept.reshape(*kept.shape, *[1] * (frames.dim() - 2))
        return replace(batch, frames=frames.to(batch.frames.dtype))

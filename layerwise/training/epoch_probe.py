"""A figure during training: how well a stage's outputs tell a label, after every so many epochs.

Training samples alone are asked, always the same ones in the same windows: of each, its nearest neighbours among others of
them. So no test sample has a say in when a training is ended.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from layerwise.config import Config
from layerwise.data.batches import Epoch, ordered_epoch, stream
from layerwise.data.source import DataSet, telling_labels
from layerwise.errors import ConfigError
from layerwise.memory.meter import uncounted
from layerwise.training.loader import Loader
from layerwise.training.samples import TRAIN
from layerwise.training.spec import StageSpec

MOST_SAMPLES = 2000

ASKED = 5
"""One in so many samples is asked; the others are known."""

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""As in Wu et al. 2018, arXiv 1805.01978: the nearest by cosine vote with weight exp(cosine / temperature)."""


@dataclass(frozen=True, slots=True)
class EpochProbe:
    """The samples of a stage that are asked for a label, and those that are known."""

    epoch: Epoch
    """Their windows, in whole batches where there are so many."""
    classes: torch.Tensor
    """int64 [windows]"""
    known: int
    """Windows that are known; those behind them are asked."""

    @classmethod
    def of(cls, config: Config, data: DataSet, split: np.ndarray, spec: StageSpec, loader: Loader) -> "EpochProbe":
        """On the run's own label, or the first one that the data have. Raises ConfigError where they have none."""
        labels = [name for name in telling_labels(data) if name in data.labels]
        if not labels:
            raise ConfigError("--probe-every shows how well a label is told, and these data have none; leave it out.")
        values, options = data.labels[config.objective.label or labels[0]], config.training
        samples = stream(options.seed, "probe samples").permutation(np.flatnonzero((split == TRAIN) & (values != "")))
        per_batch = options.batch_size // spec.renderings
        samples = samples[: max(min(len(samples), MOST_SAMPLES) // per_batch, 1) * per_batch]
        if len(samples) < 2:
            raise ConfigError("--probe-every needs two training samples that carry the label; leave it out.")
        known = (len(samples) - max(len(samples) // ASKED, 1)) * spec.renderings
        windows = stream(options.seed, "probe windows", spec.stage)
        epoch = ordered_epoch(loader, samples, spec.window, options.batch_size, windows, spec.renderings)
        _, classes = np.unique(values[epoch.samples], return_inverse=True)
        return cls(epoch, torch.from_numpy(classes.astype(np.int64)), known)

    def error(self, vectors: torch.Tensor) -> float:
        """From 0 to 1, of the asked ones among vectors float32 [windows, C]."""
        with uncounted():
            known = self.known
            vectors = F.normalize((vectors - vectors[:known].mean(0)) / (vectors[:known].std(0, correction=0) + 1e-6))
            cosines, nearest = (vectors[known:] @ vectors[:known].T).topk(min(NEIGHBOURS, known))
            votes = torch.zeros(len(cosines), int(self.classes.max()) + 1)
            votes.scatter_add_(1, self.classes[:known][nearest], (cosines / TEMPERATURE).exp())
            return float((votes.argmax(1) != self.classes[known:]).float().mean())

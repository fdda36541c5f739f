"""Labels of the frames that a stage puts out: those of the data, where each frame is centred."""

import numpy as np

from layerwise.data.source import DataSet
from layerwise.training.plan import StagePlan


def frame_labels(name: str, plan: StagePlan, data: DataSet, sample: int, frames: np.ndarray) -> np.ndarray:
    """str [F]: the label `name` at output frames (int64 [F]) of one sample."""
    return data.frame_labels(name, sample, frames * plan.geometry.hop + plan.geometry.offset)

"""Recordings of several channels are mixed to one, their mean; where they cancel, hardly anything is left."""

from collections.abc import Sequence

import numpy as np

from layerwise.data.source import several

LEFT = 0.01
"""Channels cancel where their mean has less than this part of their energy. Of N channels with nothing in common it has 1/N."""


def cancel(samples: np.ndarray) -> bool:
    """Whether channels [samples, channels] cancel; not where they are silent."""
    values = samples.astype(np.float64)
    return bool(np.square(values.mean(axis=1)).sum() < LEFT * np.square(values).sum() / values.shape[1])


def notes_on(cancelling: Sequence[str]) -> list[str]:
    """What is to be said of the recordings of these names."""
    if not cancelling:
        return []
    return [
        f"the channels of {len(cancelling)} recordings cancel where they are mixed to one, so that hardly anything is left of "
        f"them: {several(cancelling)}; store one channel alone"
    ]

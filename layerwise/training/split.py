"""Which samples train, which ones stop the training, and which ones test the probes: fixed by the seed."""

import numpy as np

from layerwise.cache import SPLITS
from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.errors import DataError
from layerwise.objectives import renderings_compared
from layerwise.streams import stream

TRAIN, HELD_OUT, TEST = (SPLITS.index(name) for name in ("train", "held-out", "test"))


def split_samples(data: DataSet, config: Config) -> np.ndarray:
    """uint8 [N], an index into SPLITS. The customary test split where there is one, else a random part of the samples.

    Raises DataError where a part would be empty.
    """
    count = len(data.ids)
    order = stream(config.training.seed, "split").permutation(count)
    split = np.full(count, TRAIN, dtype=np.uint8)
    if data.test is not None:
        split[data.test] = TEST
    else:
        split[order[: max(1, round(count * config.data.test))]] = TEST
    rest = order[split[order] == TRAIN]
    if len(rest) < 2 or len(rest) == count:
        raise DataError(
            f"The data set has {count} usable samples, too few to train, to hold out and to test on; three are the least."
        )
    # Alone in its batch, a sample has no others to be told from.
    least = renderings_compared(config.objective.name)
    split[rest[: max(least, round(len(rest) * config.data.held_out))]] = HELD_OUT
    if not (split == TRAIN).any():
        raise DataError("No sample is left to train on; lower data.held_out.")
    return split

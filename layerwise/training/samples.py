"""Which samples train, which stop the training and which test the probes, fixed by the seed; and their classes."""

import hashlib

import numpy as np

from layerwise.cache import SPLITS
from layerwise.config import Config
from layerwise.data.batches import stream
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError, DataError, did_you_mean
from layerwise.objectives import renderings_compared
from layerwise.objectives.pooled import UNLABELLED

TRAIN, HELD_OUT, TEST = (SPLITS.index(name) for name in ("train", "held-out", "test"))


def split_samples(data: DataSet, config: Config) -> np.ndarray:
    """uint8 [N], an index into SPLITS. The customary test split where there is one, else a random part of the samples.

    Held out are the customary samples where there are some, else a random part of those that are left. Raises DataError where
    a part would be empty.
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
    held_out = getattr(data, "held_out", None)
    if held_out is not None and held_out.sum() >= least:
        split[held_out] = HELD_OUT
    else:
        split[rest[: max(least, round(len(rest) * config.data.held_out))]] = HELD_OUT
    if not (split == TRAIN).any():
        raise DataError("No sample is left to train on; lower data.held_out.")
    return split


def sample_classes(config: Config, data: DataSet) -> np.ndarray | None:
    """int64 [N], the class of each sample under `objective.label`, -1 where it has none; None where no label is named.

    Raises ConfigError where the objective needs a label, DataError where the data do not have it.
    """
    label = config.objective.label
    if not label:
        if config.objective.name == "supervised":
            labels = " or ".join(data.labels) or "NAME (the data have none at all)"
            raise ConfigError(f"--objective supervised learns a label; name one: --label {labels}.")
        return None
    if label not in data.labels:
        raise DataError(
            f"--label {label}: the data have no such label; they have {', '.join(data.labels) or 'none'}, and --labels "
            f"FILE.csv can bring more.{did_you_mean(label, data.labels)}"
        )
    values = data.labels[label]
    known = np.unique(values[values != ""])
    if len(known) < 2:
        raise DataError(f"--label {label} has {len(known)} values in these data; there is nothing to tell apart.")
    return np.where(values == "", UNLABELLED, np.searchsorted(known, values)).astype(np.int64)


def learnt_classes(config: Config, data: DataSet) -> str:
    """A digest of the classes that are learnt; empty where none are. A file of labels is no part of the data's identity."""
    classes = sample_classes(config, data)
    return "" if classes is None else hashlib.sha256(classes.tobytes()).hexdigest()


def count_classes(config: Config, data: DataSet) -> int:
    """Classes of the label that is learnt; 0 where none is. Raises as `sample_classes`."""
    classes = sample_classes(config, data)
    return 0 if classes is None else int(classes.max()) + 1

"""The classes of the samples, for an objective that learns a label."""

import numpy as np

from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError, DataError
from layerwise.near import did_you_mean
from layerwise.objectives.supervised import UNLABELLED


def sample_classes(config: Config, data: DataSet) -> np.ndarray | None:
    """int64 [N], the class of each sample under `objective.label`, -1 where it has none; None where no label is named.

    Raises ConfigError where the objective needs a label, DataError where the data do not have it.
    """
    label = config.objective.label
    if not label:
        if config.objective.name == "supervised":
            raise ConfigError(f"--objective supervised learns a label; name one: --label {_example(data)}.")
        return None
    if label not in data.labels:
        raise DataError(
            f"--label {label}: the data have no such label; they have {', '.join(data.labels) or 'none'}."
            f"{did_you_mean(label, data.labels)}"
        )
    values = data.labels[label]
    known = np.unique(values[values != ""])
    if len(known) < 2:
        raise DataError(f"--label {label} has {len(known)} values in these data; there is nothing to tell apart.")
    return np.where(values == "", UNLABELLED, np.searchsorted(known, values)).astype(np.int64)


def count_classes(config: Config, data: DataSet) -> int:
    """Classes of the label that is learnt; 0 where none is. Raises as `sample_classes`."""
    classes = sample_classes(config, data)
    return 0 if classes is None else int(classes.max()) + 1


def _example(data: DataSet) -> str:
    return " or ".join(data.labels) or "NAME (the data have none at all)"

"""What a probe is to predict: a label, of the samples or of their frames, split as in the run."""

from dataclasses import dataclass

import numpy as np

from layerwise.cache import SPLITS
from layerwise.config import Config
from layerwise.data.batches import stream
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError, DataError, did_you_mean
from layerwise.evaluate.examples import Parts
from layerwise.training.samples import split_samples
from layerwise.training.spec import StageSpec, frame_labels

FRAMES_PER_SAMPLE = 32
"""Most frames of a sample that a per-frame probe sees; enough for a stable error and bounded memory."""


@dataclass(frozen=True, slots=True)
class ProbeTask:
    """A label, and the samples that carry it; rows of features come sample by sample in this order."""

    label: str
    data: DataSet
    per_frame: bool
    samples: np.ndarray
    """int64 [S], numbers of the samples that carry the label: those of the training split first, of the test last."""
    split: np.ndarray
    """uint8 [S]"""
    grid: int = 1
    """Features of a sample are means over so many cells a side."""
    whole: bool = False
    """Whether a sample is a single frame, of which the positions lie in the cells."""


@dataclass(frozen=True, slots=True)
class ProbeTargets:
    """The class of each row of a stage's features."""

    names: tuple[str, ...]
    """Of the classes."""
    classes: np.ndarray
    """int64 [rows]"""
    parts: Parts


def probe_task(label: str, data: DataSet, config: Config, grid: int | None = None) -> ProbeTask:
    """The task of telling a label; grid: of ProbeTask, None for 2 of pictures and volumes, 1 of all else.

    Raises DataError where the data do not have the label, or it has one value only, ConfigError for the grid.
    """
    per_frame = label in data.frame_label_names
    if grid is not None and (grid < 1 or (per_frame and grid > 1)):
        of_frames = (
            f", and the label {label} is one of single frames; leave it out." if per_frame else "; give 1, 2 or 4."
        )
        raise ConfigError(f"--grid {grid}: features are means over so many cells a side{of_frames}")
    if grid is None:
        spatial = data.columns > 1 or (config.data.frames == "whole" and len(data.frame_shape) > 2)
        grid = 2 if spatial and not per_frame else 1
    split = split_samples(data, config)
    samples = np.arange(len(data.ids)) if per_frame else _labelled(label, data, split)
    samples = samples[np.argsort(split[samples], kind="stable")]
    return ProbeTask(label, data, per_frame, samples, split[samples], grid, config.data.frames == "whole")


def probe_targets(task: ProbeTask, spec: StageSpec) -> ProbeTargets:
    """The targets for the features of one stage."""
    if task.per_frame:
        numbers = task.samples.tolist()
        chosen = [choose_frames(sample, int(spec.output_lengths[sample]), per_frame=True) for sample in numbers]
        labels = [frame_labels(task.label, spec, task.data, *each) for each in zip(numbers, chosen, strict=True)]
        values, split = np.concatenate(labels), np.repeat(task.split, [len(frames) for frames in chosen])
    else:
        values, split = task.data.labels[task.label][task.samples], task.split
    names, classes = np.unique(values, return_inverse=True)
    counts = np.bincount(split, minlength=len(SPLITS)).tolist()
    return ProbeTargets(tuple(names.tolist()), classes.astype(np.int64), Parts.of(*counts))


def choose_frames(sample: int, length: int, per_frame: bool) -> np.ndarray:
    """The frames of a sample that a per-frame probe sees, the same for every encoder; none for other probes."""
    if not per_frame:
        return np.zeros(0, dtype=np.int64)
    count = min(length, FRAMES_PER_SAMPLE)
    return np.sort(stream(0, "probe frames", sample).choice(length, count, replace=False))


def _labelled(label: str, data: DataSet, split: np.ndarray) -> np.ndarray:
    """Numbers of the samples that carry the label."""
    if label not in data.labels:
        known = sorted(
            {*(name for name, values in data.labels.items() if (values != "").any()), *data.frame_label_names}
        )
        raise DataError(
            f"The data have no label {label!r}; they have {', '.join(known) or 'none at all'}, and --labels FILE.csv can bring "
            f"more.{did_you_mean(label, known)}"
        )
    values = data.labels[label]
    classes = np.unique(values[values != ""])
    if len(classes) < 2:
        only = f"is '{classes[0]}' everywhere" if len(classes) else "is empty everywhere"
        raise DataError(
            f"The label {label!r} {only}: there is nothing to tell apart; name another, or a file of labels with --labels."
        )
    samples = np.flatnonzero(values != "")
    for part in ("train", "test"):
        if not (split[samples] == SPLITS.index(part)).any():
            raise DataError(f"No sample of the {part} split carries the label {label!r}.")
    return samples

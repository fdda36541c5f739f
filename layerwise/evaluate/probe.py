"""Linear probes: how well each stage's frozen representation tells a label, against the same stage with random weights.

The test samples were never seen by the encoder's training nor by the probe's.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from layerwise.cache import SPLITS, ActivationCache
from layerwise.config import load
from layerwise.data.open import open_data
from layerwise.errors import BudgetError, DataError, RunError
from layerwise.evaluate.features import cached_features, choose_frames
from layerwise.evaluate.linear import probe_error
from layerwise.evaluate.untrained import untrained_features
from layerwise.files import write_atomically
from layerwise.memory.allocator import meter_for
from layerwise.memory.device import cap, find_device, release
from layerwise.nets import shortest_sample
from layerwise.run_directory import RunPaths, RunState, open_run
from layerwise.stop import StopFlag

SHORTEST_PIECE = 64
"""Frames of a sequence, or rows of a picture, below which pieces are not made smaller."""


@dataclass(frozen=True, slots=True)
class StageError:
    """Error rates from 0 to 1; train and test count samples, or frames where the label is per frame."""

    stage: int
    error: float
    untrained_error: float
    train: int
    test: int


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe of every finished stage."""

    label: str
    stages: list[StageError]
    peak_bytes: int
    """Most that the probe held on the device."""


def probe(
    run_directory: Path,
    label: str,
    *,
    stop: StopFlag | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> ProbeResult:
    """Fits a linear classifier for `label` on each cached stage; also written to probes/LABEL.json.

    Raises RunError where no stage is cached, DataError where the label does not exist or has one value only.
    """
    stop = stop or StopFlag()
    paths, state = open_run(run_directory)
    if state.network:
        raise RunError(f"{run_directory} was trained with a network of its own, which probes cannot build again yet.")
    stages = [record.stage for record in state.stages if record.status == "done"]
    if not stages:
        raise RunError(f"No stage of {run_directory} is done yet; go on with the run first.")
    with ExitStack() as open_caches:
        caches = [open_caches.enter_context(ActivationCache(paths.cache(stage))) for stage in stages]
        for cache in caches:
            cache.verify(lambda: stop.raise_if_set("while probing"))
        per_frame = label in caches[0].layout.frame_labels
        samples = _labelled_samples(caches[0], label, per_frame, run_directory)
        notify("features of the same network with random weights")
        untrained, peak = _untrained(paths, state, samples, per_frame, stop)
        results = []
        for cache in caches:
            stop.raise_if_set(f"before the probe of stage {cache.layout.stage}")
            notify(f"stage {cache.layout.stage}")
            results.append(_probe_stage(cache, label, samples, per_frame, untrained[cache.layout.stage - 1]))
    result = ProbeResult(label, results, peak)
    write_atomically(paths.probe(label), (json.dumps(asdict(result), indent=2) + "\n").encode())
    return result


def _labelled_samples(cache: ActivationCache, label: str, per_frame: bool, run_directory: Path) -> np.ndarray:
    """Numbers of the samples that carry the label."""
    layout = cache.layout
    if not per_frame and label not in layout.labels:
        known = sorted({*layout.labels, *layout.frame_labels})
        raise DataError(
            f"The data of {run_directory} has no label {label!r}; it has {', '.join(known) or 'none at all'}."
        )
    values = layout.frame_labels[label] if per_frame else layout.labels[label]
    classes = np.unique(values[values != ""])
    if len(classes) < 2:
        only = f"is '{classes[0]}' everywhere" if len(classes) else "is empty everywhere"
        raise DataError(f"The label {label!r} {only}: there is nothing to tell apart.")
    samples = np.arange(len(layout.ids)) if per_frame else np.flatnonzero(values != "")
    for part in ("train", "test"):
        if not (layout.split[samples] == SPLITS.index(part)).any():
            raise DataError(f"No sample of the {part} split carries the label {label!r}.")
    return samples


def _untrained(
    paths: RunPaths, state: RunState, samples: np.ndarray, per_frame: bool, stop: StopFlag
) -> tuple[list[np.ndarray], int]:
    """Features of each stage with random weights, and the bytes on the device that they took."""
    config = load(paths.config)
    data = open_data(config.data, shortest_sample(config))
    if data.identity != state.data_identity:
        raise DataError(
            f"The data at {config.data.source} are not those of the run any more; the comparison with random weights "
            "needs them. Bring the old ones back."
        )
    device, budget = find_device(config.training.device), config.memory.gpu_mem
    cap(device, budget)
    piece = config.training.batch_size * (config.data.window if data.columns == 1 else int(data.lengths[0])) // 2
    while True:
        meter = meter_for(device, budget)
        try:
            with meter:
                features = untrained_features(config, state.cut, data, samples, piece, per_frame, device, stop)
            return features, meter.peak
        except (BudgetError, torch.OutOfMemoryError) as error:
            reason = str(error)
        if piece <= SHORTEST_PIECE * data.columns:
            raise BudgetError(f"--gpu-mem {budget} cannot hold the probe: {reason}")
        piece //= 2
        release(device)


def _probe_stage(
    cache: ActivationCache, label: str, samples: np.ndarray, per_frame: bool, untrained: np.ndarray
) -> StageError:
    values, split = _values_and_split(cache, label, samples, per_frame)
    classes = np.unique(values, return_inverse=True)[1].astype(np.int64)
    train, held_out, test = (np.flatnonzero(split == number) for number in range(len(SPLITS)))
    trained = cached_features(cache, samples, per_frame)
    return StageError(
        stage=cache.layout.stage,
        error=probe_error(trained, classes, train, held_out, test),
        untrained_error=probe_error(untrained, classes, train, held_out, test),
        train=len(train) + len(held_out),
        test=len(test),
    )


def _values_and_split(
    cache: ActivationCache, label: str, samples: np.ndarray, per_frame: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Label and split of each row of the features."""
    layout = cache.layout
    if not per_frame:
        return layout.labels[label][samples], layout.split[samples]
    firsts = np.concatenate([[0], np.cumsum(layout.lengths)])
    chosen = [choose_frames(sample, int(layout.lengths[sample]), per_frame=True) for sample in samples.tolist()]
    rows = np.concatenate([firsts[sample] + frames for sample, frames in zip(samples.tolist(), chosen, strict=True)])
    split = np.repeat(layout.split[samples], [len(frames) for frames in chosen])
    return layout.frame_labels[label][rows], split

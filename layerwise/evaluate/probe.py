"""Linear probes: how well each stage's frozen representation tells a label, against the same stage with random weights.

The test samples were never seen by the encoder's training nor by the probe's. Features come from the caches that are
there; those of other stages are made again from the data.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from layerwise.cache import SPLITS, ActivationCache
from layerwise.config import Config, load
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.errors import BudgetError, CacheError, DataError, RunError
from layerwise.evaluate.features import cached_features, choose_frames
from layerwise.evaluate.linear import probe_error
from layerwise.evaluate.passed import passed_features
from layerwise.files import write_atomically
from layerwise.memory.allocator import meter_for
from layerwise.memory.device import cap, find_device, release, why_out_of_memory
from layerwise.memory.meter import uncounted
from layerwise.nets import build_network, shortest_sample
from layerwise.nets.module import Module
from layerwise.nets.network import ranges
from layerwise.run_directory import RunPaths, RunState, open_run
from layerwise.stop import StopFlag
from layerwise.training.checkpoint import load_stage, load_weights
from layerwise.training.labels import frame_labels
from layerwise.training.plan import StagePlan, plan_stages
from layerwise.training.split import split_samples

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
    run_directory: str | Path,
    label: str,
    *,
    stop: StopFlag | None = None,
    notify: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
) -> ProbeResult:
    """Fits a linear classifier for `label` on each finished stage; also written to probes/LABEL.json.

    notify: is told what it is at; warn: which caches cannot be used. Their stages are passed through anew.

    Raises RunError where no stage is done, DataError where the label does not exist or has one value only.
    """
    stop, run_directory = stop or StopFlag(), Path(run_directory)
    paths, state = open_run(run_directory)
    if state.network:
        raise RunError(f"{run_directory} was trained with a network of its own, which probes cannot build again yet.")
    stages = [record.stage for record in state.stages if record.status == "done"]
    if not stages:
        raise RunError(f"No stage of {run_directory} is done yet; go on with the run first.")
    config = load(paths.config)
    data = _data_of_the_run(config, state)
    plans = plan_stages(config, data, build_network(config.net, data.frame_shape), ranges(state.cut))
    per_frame = label in data.frame_label_names
    split = split_samples(data, config)
    samples = _labelled_samples(data, split, label, per_frame, run_directory)
    features_of = partial(_pass_under_budget, config, data, samples, per_frame, stop)

    notify("features of the same network with random weights")
    untrained, peak = features_of(_modules(config, plans[: len(stages)]))
    trained = {stage: _cached_features(paths, state, stage, samples, per_frame, stop, warn) for stage in stages}
    if any(features is None for features in trained.values()):
        notify("features of stages that are not cached")
        passed, more = features_of(_modules(config, plans[: len(stages)], paths))
        trained = {stage: passed[stage - 1] if kept is None else kept for stage, kept in trained.items()}
        peak = max(peak, more)
    results = []
    for stage, features in trained.items():
        stop.raise_if_set(f"before the probe of stage {stage}")
        notify(f"stage {stage}")
        values, parts = _values_and_split(label, data, plans[stage - 1], split, samples, per_frame)
        results.append(_probe_stage(stage, features, untrained[stage - 1], values, parts))
    result = ProbeResult(label, results, peak)
    write_atomically(paths.probe(label), (json.dumps(asdict(result), indent=2) + "\n").encode())
    return result


def _data_of_the_run(config: Config, state: RunState) -> DataSet:
    data = open_data(config.data, shortest_sample(config))
    if data.identity != state.data_identity:
        raise DataError(
            f"The data at {config.data.source} are not those of the run any more; the comparison with random weights "
            "needs them. Bring the old ones back."
        )
    return data


def _labelled_samples(data: DataSet, split: np.ndarray, label: str, per_frame: bool, run_directory: Path) -> np.ndarray:
    """Numbers of the samples that carry the label."""
    if not per_frame and label not in data.labels:
        known = sorted({*data.labels, *data.frame_label_names})
        raise DataError(
            f"The data of {run_directory} has no label {label!r}; it has {', '.join(known) or 'none at all'}."
        )
    if per_frame:
        return np.arange(len(data.ids))
    values = data.labels[label]
    _check_classes(label, values)
    samples = np.flatnonzero(values != "")
    for part in ("train", "test"):
        if not (split[samples] == SPLITS.index(part)).any():
            raise DataError(f"No sample of the {part} split carries the label {label!r}.")
    return samples


def _check_classes(label: str, values: np.ndarray) -> None:
    classes = np.unique(values[values != ""])
    if len(classes) < 2:
        only = f"is '{classes[0]}' everywhere" if len(classes) else "is empty everywhere"
        raise DataError(f"The label {label!r} {only}: there is nothing to tell apart.")


def _modules(config: Config, plans: list[StagePlan], trained: RunPaths | None = None) -> list[Module]:
    """The modules of these stages in host memory: with random weights, or as trained in a run."""
    with uncounted():
        modules = [plan.build_module(config.training.seed, torch.device("cpu")).eval() for plan in plans]
        if trained is not None:
            for plan, module in zip(plans, modules, strict=True):
                load_weights(module, load_stage(trained, plan.stage))
    return modules


def _pass_under_budget(
    config: Config, data: DataSet, samples: np.ndarray, per_frame: bool, stop: StopFlag, modules: list[Module]
) -> tuple[list[np.ndarray], int]:
    """Features of each stage, and the bytes on the device that they took."""
    device, budget = find_device(config.training.device), config.memory.gpu_mem
    cap(device, budget)
    piece = config.training.batch_size * (config.data.window if data.columns == 1 else int(data.lengths[0])) // 2
    while True:
        meter = meter_for(device, budget)
        try:
            with meter:
                features = passed_features(modules, data, samples, piece, per_frame, device, stop)
            return features, meter.peak
        except (BudgetError, RuntimeError) as error:
            reason = why_out_of_memory(error)
        if piece <= SHORTEST_PIECE * data.columns:
            raise BudgetError(
                f"The run's --gpu-mem of {budget} bytes cannot hold the probe: {reason} Start the run again with a larger "
                "--gpu-mem, which changes nothing else, and probe then."
            )
        piece //= 2
        release(device)


def _cached_features(
    paths: RunPaths,
    state: RunState,
    stage: int,
    samples: np.ndarray,
    per_frame: bool,
    stop: StopFlag,
    warn: Callable[[str], None],
) -> np.ndarray | None:
    """From the stage's cache, or None where it is not there or cannot be used."""
    if not paths.cache(stage).exists():
        return None
    try:
        with ActivationCache(paths.cache(stage)) as cache:
            if cache.layout.fingerprint != state.record(stage).fingerprint:
                raise RunError(f"{cache.path} was not made by this run; move it away.")
            return cached_features(cache, samples, per_frame, lambda: stop.raise_if_set("while probing"))
    except CacheError as error:
        warn(f"{error} Until then probes recompute the features of stage {stage}.")
        return None


def _values_and_split(
    label: str, data: DataSet, plan: StagePlan, split: np.ndarray, samples: np.ndarray, per_frame: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Label and split of each row of the features."""
    if not per_frame:
        return data.labels[label][samples], split[samples]
    chosen = [choose_frames(sample, int(plan.output_lengths[sample]), per_frame=True) for sample in samples.tolist()]
    values = [
        frame_labels(label, plan, data, sample, frames) for sample, frames in zip(samples.tolist(), chosen, strict=True)
    ]
    return np.concatenate(values), np.repeat(split[samples], [len(frames) for frames in chosen])


def _probe_stage(
    stage: int, trained: np.ndarray, untrained: np.ndarray, values: np.ndarray, split: np.ndarray
) -> StageError:
    classes = np.unique(values, return_inverse=True)[1].astype(np.int64)
    train, held_out, test = (np.flatnonzero(split == number) for number in range(len(SPLITS)))
    return StageError(
        stage=stage,
        error=probe_error(trained, classes, train, held_out, test),
        untrained_error=probe_error(untrained, classes, train, held_out, test),
        train=len(train) + len(held_out),
        test=len(test),
    )

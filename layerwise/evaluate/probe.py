"""Probes: how well each stage's frozen representation tells a label, against the same stage with random weights.

The test samples were never seen by the encoder's training nor by the classifier's. Features come from the caches that
are there; those of other stages are made again from the data.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from layerwise.cache import ActivationCache
from layerwise.config import Config, named_here, with_options
from layerwise.data.labels import with_labels
from layerwise.data.open import as_data, open_data
from layerwise.data.source import DataSet
from layerwise.errors import CacheError, ConfigError, DataError, RunError, did_you_mean
from layerwise.evaluate.baseline import baseline_of
from layerwise.evaluate.classifiers import CLASSIFIERS, fit_and_test
from layerwise.evaluate.examples import FeatureRows
from layerwise.evaluate.features import cached_features, features_under_budget
from layerwise.evaluate.targets import ProbeTask, probe_targets, probe_task
from layerwise.events import Message, NotifyProgress, Progress, unseen
from layerwise.nets import build_network, shortest_sample
from layerwise.nets.network import Network, ranges
from layerwise.nets.traced import traced_network, with_present_weights
from layerwise.records import read_record
from layerwise.run_store import RunState, RunStore, open_run
from layerwise.run_store.state import Baseline, ProbeResult, StageError, StageRecord
from layerwise.stop import StopFlag
from layerwise.training.checkpoint import load_stages
from layerwise.training.first_weights import is_network_of, load_first_weights, without_lost_weights
from layerwise.training.forward import InferenceStage, OutputFormat, random_stages, trained_stages
from layerwise.training.spec import StageSpec, stage_specs


def probe(
    run_directory: str | Path,
    label: str,
    *,
    classifier: str = "linear",
    grid: int | None = None,
    network: nn.Module | Network | str | None = None,
    data: Any = None,
    labels: str | Path | None = None,
    stop: StopFlag | None = None,
    notify: NotifyProgress = unseen,
) -> ProbeResult:
    """How well a classifier on the frozen features of each stage tells a label, beside the same stage with random weights.

    Also written to probes/LABEL.json; LABEL-knn.json with another classifier, LABEL-grid4.json with another grid. classifier:
    linear, or knn (nearest neighbours). grid: features are means over so many cells a side of a picture, or over so many
    stretches of a sequence; None: 2 of pictures, else 1. network, data: those of the run, where it was given objects or a
    package.module:function, which is not called otherwise; data may also say where they lie now. labels: a CSV file in place
    of the run's, "" for none. stop: ends it when its reason is set. notify: is told what it is at, what was found in labels,
    and which caches cannot be used; their stages are passed through anew.
    Raises RunError where no stage is done, ConfigError for network, data and grid, DataError where the label does not exist
    or has one value only.
    """
    return probe_label(
        open_to_probe(run_directory, network, data, labels, notify), label, classifier, grid, stop, notify
    )


@dataclass(frozen=True)
class OpenedRun:
    """A run whose stages are to be probed, and its data."""

    store: RunStore
    state: RunState
    config: Config
    data: DataSet
    network: Network
    specs: list[StageSpec]
    """Of the stages up to the last one that is done."""

    @property
    def records(self) -> list[StageRecord]:
        return self.state.stages[: len(self.specs)]

    @property
    def output_formats(self) -> list[OutputFormat]:
        return [OutputFormat.of(record.trained_with) for record in self.records]

    def untrained(self) -> list[InferenceStage]:
        """The stages with the weights that training began with."""
        # A module that was given may hold any weights by now: the untrained ones are those that the run has kept.
        first = None if self.network.model is None else load_first_weights(self.store)
        if first is None:
            return random_stages(self.specs, self.output_formats, self.config.training.seed)
        return trained_stages(self.specs, self.output_formats, first)

    def trained(self, count: int) -> list[InferenceStage]:
        """The first stages, as they were trained."""
        weights = load_stages(self.store, self.records[:count])
        return trained_stages(self.specs[:count], self.output_formats[:count], weights)


def _done(state: RunState) -> list[int]:
    return [record.stage for record in state.stages if record.status == "done"]


def open_to_probe(
    run_directory: str | Path,
    network: nn.Module | Network | str | None = None,
    data: Any = None,
    labels: str | Path | None = None,
    notify: NotifyProgress = unseen,
) -> OpenedRun:
    """Arguments, and what is raised for them: those of `probe`."""
    run_directory = Path(run_directory)
    if isinstance(network, Config):
        raise ConfigError("A probe knows the options of its run; give it a network alone, or leave it out.")
    store, state = open_run(run_directory)
    if not _done(state):
        raise RunError(f"No stage of {run_directory} is done yet; go on with the run first.")
    config = named_here(state.config, {"net.name": network, "data.source": data}, store.state)
    labels_of_run = config.data.labels
    if labels is not None:
        config = with_options(config, {"data.labels": ""})
    named = data is None or isinstance(data, str)
    if named and isinstance(network, nn.Module):
        raise ConfigError("A probe needs the data of the run beside its network: give data= too, as an object.")
    data = open_data(config.data, shortest_sample(config)) if named else as_data(data, config.data)
    if data.identity != state.data_identity:
        raise DataError(
            f"The data at {config.data.source} are not those of the run any more, or an earlier version of layerwise read them "
            "otherwise; the comparison with random weights needs them. Bring the old ones back, or train a new run."
        )
    if labels is not None:
        without, data = data, with_labels(data, str(labels))
        if config.objective.label not in ("", *data.labels):  # that which was learnt is needed, too
            data = with_labels(with_labels(without, labels_of_run), str(labels))
        for line in getattr(data, "notes", ()):
            notify(Message(line))
    if network is None or isinstance(network, str):
        net = without_lost_weights(config, store).net
        network = build_network(net, data.frame_shape, config.training.seed)
    elif isinstance(network, nn.Module):
        network = traced_network(network, tuple(data.frame_shape))
    network = with_present_weights(network)
    if not is_network_of(state, store, network):
        raise RunError(f"The network given is not the one that {run_directory} was trained with; give that one.")
    specs = stage_specs(config, data, network, ranges(state.cut))[: max(_done(state))]
    return OpenedRun(store, state, config, data, network, specs)


def probe_label(
    opened: OpenedRun,
    label: str,
    classifier: str = "linear",
    grid: int | None = None,
    stop: StopFlag | None = None,
    notify: NotifyProgress = unseen,
) -> ProbeResult:
    """Arguments, and what is raised for them: those of `probe`."""
    if classifier not in CLASSIFIERS:
        raise ConfigError(
            f"There is no probe {classifier!r}; there are {', '.join(CLASSIFIERS)}.{did_you_mean(classifier, CLASSIFIERS)}"
        )
    stop = stop or StopFlag()
    store, config = opened.store, opened.config
    task = probe_task(label, opened.data, config, grid)

    def show(doing: str) -> Callable[[int], None]:
        notify(Progress(doing, 0, len(task.samples)))
        return lambda done: notify(Progress(doing, done, len(task.samples)))

    show_samples = show("features of the same network with random weights")
    untrained, peak = features_under_budget(config, task, opened.untrained(), store.probes, stop, show_samples)
    recomputed: list[FeatureRows] = []
    cached = {stage: _cached_features(store, opened.state, stage, task, stop, notify) for stage in _done(opened.state)}
    if missing := [stage for stage, features in cached.items() if features is None]:
        show_samples = show("features of stages that are not cached")
        trained = opened.trained(max(missing))
        recomputed, more = features_under_budget(config, task, trained, store.probes, stop, show_samples)
        peak = max(peak, more)
    results = []
    for number, (stage, features) in enumerate(cached.items()):
        poll = partial(stop.raise_if_set, f"in the probe of stage {stage}")
        notify(Progress("classifiers", number, len(cached)))
        targets = probe_targets(task, opened.specs[stage - 1])
        of_stage = recomputed[stage - 1] if features is None else features
        error, confusion = fit_and_test(of_stage, targets, classifier, poll)
        untrained_error, _ = fit_and_test(untrained[stage - 1], targets, classifier, poll)
        train, test = len(targets.parts.fitted), len(targets.parts.test)
        weights = str(opened.state.record(stage).weights)
        results.append(StageError(stage, error, untrained_error, train, test, confusion, weights))
    name = label if classifier == "linear" else f"{label}-{classifier}"
    poll = partial(stop.raise_if_set, "in the baseline of the probe")
    known = _known_baseline(store, name)  # of any grid: it has its own
    baseline = baseline_of(task, targets, opened.specs[-1], classifier, config, store.probes, known, poll)
    if task.grid != probe_task(label, opened.data, config).grid:
        name = f"{name}-grid{task.grid}"
    result = ProbeResult(label, results, peak, classifier, task.grid, baseline)
    store.write_probe(name, result)
    return result


def _known_baseline(store: RunStore, name: str) -> Baseline | None:
    """Of an earlier probe; a record that cannot be read is written anew."""
    with suppress(RunError):
        return read_record(ProbeResult, store.probe(name)).baseline
    return None


def _cached_features(
    store: RunStore, state: RunState, stage: int, task: ProbeTask, stop: StopFlag, notify: NotifyProgress
) -> FeatureRows | None:
    """From the stage's cache, or None where it is not there or cannot be used."""
    if not store.cache(stage).exists():
        return None
    try:
        with ActivationCache(store.cache(stage), str(state.record(stage).fingerprint)) as cache:
            features = FeatureRows(store.probes)
            poll = partial(stop.raise_if_set, "while probing")
            cached_features(cache, task, features, poll)
            return features
    except CacheError as error:
        notify(Message(f"{error} Until then probes recompute the features of stage {stage}."))
        return None

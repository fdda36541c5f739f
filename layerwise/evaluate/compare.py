"""Compares the methods of the paper (Löwe et al. 2019, tables 1 and 2): the same data, cut, epochs, seeds and probes.

Each method is a set of options of a run. Every run lies in OUT/runs/METHOD/seed-N, a run directory like any other, and the
outcomes in OUT/compare.json. A second start does only what is missing.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from layerwise.config import Config, changed_options, load, with_options
from layerwise.data.open import open_data
from layerwise.data.source import DataSet, digest
from layerwise.engines.run import UserObjects, run
from layerwise.errors import ConfigError, RunError, did_you_mean
from layerwise.evaluate.classifiers import fit_and_test
from layerwise.evaluate.features import features_under_budget
from layerwise.evaluate.results import (
    COMPARISON,
    EQUALLY_LONG,
    GREEDY,
    METHODS,
    UNTRAINED,
    Comparison,
    Outcome,
    load_comparison,
)
from layerwise.evaluate.targets import ProbeTask, probe_targets, probe_task
from layerwise.events import Notify, silent
from layerwise.files import exclusive, write_atomically
from layerwise.memory.device import find_device
from layerwise.nets import build_network, shortest_sample
from layerwise.nets.network import ranges
from layerwise.stop import StopFlag
from layerwise.training.cache_plan import CachePlan, cache_sizes, disk_peak
from layerwise.training.cache_retention import remove_caches
from layerwise.training.cut import cut_network
from layerwise.training.encoder import load_encoder
from layerwise.training.forward import InferenceStage, OutputFormat, random_stages, trained_stages
from layerwise.training.resume import listed_changes
from layerwise.training.spec import StageSpec, stage_specs


def config_of(method: str, seed: int, config: Config, label: str) -> Config:
    """The options of one run of a method. Every module of the EQUALLY_LONG is trained for `max_epochs` epochs, those of the
    others until the held-out loss has not fallen for `patience` epochs.

    The budget is for training one stage at a time: what is trained as a whole goes without.
    """
    out, options = Path(config.out), config.training
    changes = {
        "objective.label": "",
        "training.schedule": "sequential",
        "training.seed": seed,
        "training.patience": options.max_epochs if method in EQUALLY_LONG else options.patience,
        "out": str(_folder(out, method, seed)),
        "cache.dir": str(Path(config.cache.dir) / out.resolve().name / method),
        **METHODS[method],
    }
    if changes.get("objective.name") == "supervised":
        changes["objective.label"] = label
    if changes.get("training.stages") == 1 or changes.get("training.schedule") == "simultaneous":
        changes |= {"memory.gpu_mem": None, "cache.policy": "never"}
    return with_options(config, changes)


FREE = {
    "out",
    "cache.dir",
    "cache.block",
    "training.checkpoint_seconds",
    "training.log",
    "cache.scratch",
    "engine.time",
}
"""Options that may differ between two starts of a comparison; all others act on what it shows: memory, disk and time, too."""


def compare(
    config: Config,
    label: str,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = EQUALLY_LONG,
    stop: StopFlag | None = None,
    notify: Notify = silent,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Trains each method with each seed, see `config_of`, and probes `label` after each module.

    notify: is told what happens in the runs; tell: of the runs. Raises ConfigError where a method is unknown or the folder
    holds a comparison with other options, RunError where it holds something else or the data have changed, Interrupted
    after saving when asked to stop.
    """
    if unknown := next((method for method in methods if method not in METHODS), None):
        raise ConfigError(
            f"There is no method {unknown!r} to compare; there are {', '.join(METHODS)}.{did_you_mean(unknown, METHODS)}"
        )
    stop, out = stop or StopFlag(), Path(config.out)
    wanted = [(method, seed) for seed in seeds for method in METHODS if method in methods]
    config = with_options(config, {"objective.label": "", "training.seed": 0})  # each run has its own
    data = open_data(config.data, shortest_sample(config))
    _check_request(config, label, data, seeds, methods)
    with exclusive(
        out / "lock", RunError(f"Another process is comparing in {out}; wait for it, or name another --out.")
    ):
        comparison = _load_or_begin(out, config, label, data)
        comparison.finished = False
        comparison.save(out)
        for method, seed in wanted:
            if not any((each.method, each.seed) == (method, seed) for each in comparison.outcomes):
                tell(f"{method}, seed {seed}")
                comparison.outcomes.append(_outcome(method, seed, config, comparison, data, stop, notify))
                comparison.save(out)
            # After a kill in between, the caches of what is known are still there.
            if (_folder(out, method, seed) / "run.json").exists():
                remove_caches(_folder(out, method, seed), None)
        comparison.finished = len({tuple(sorted(method.seeds)) for method in comparison.methods}) == 1
        comparison.save(out)
    return comparison


def _check_request(config: Config, label: str, data: DataSet, seeds: Sequence[int], methods: Sequence[str]) -> None:
    """Refuses what cannot be compared before anything is trained. Raises ConfigError or DataError."""
    if config.objective.name == "supervised":
        raise ConfigError(
            "--objective supervised: a comparison has supervised methods beside that of the run; leave it out, or give another."
        )
    for method, seed in product(dict.fromkeys((GREEDY, *methods)), seeds):
        probe_task(label, data, config_of(method, seed, config, label))
    supervised = [method for method in methods if METHODS[method].get("objective.name") == "supervised"]
    if supervised and label not in data.labels:
        raise ConfigError(
            f"--label {label} is one of frames, which {' and '.join(supervised)} cannot learn; leave them out with --methods."
        )


UNFINISHED_START = {"lock", "config.toml", "config.toml.tmp", f"{COMPARISON}.tmp"}
"""What a comparison may have left that was killed before anything was known."""


def _folder(out: Path, method: str, seed: int) -> Path:
    return out / "runs" / method / f"seed-{seed}"


def _load_or_begin(out: Path, config: Config, label: str, data: DataSet) -> Comparison:
    """What an earlier start has left, which must have had the same options and data."""
    if not (out / COMPARISON).exists():
        others = sorted(entry.name for entry in out.iterdir() if entry.name not in UNFINISHED_START)
        if others:
            raise RunError(f"--out {out} holds something else ({others[0]}); name a new or empty folder.")
        greedy = config_of(GREEDY, config.training.seed, config, label)
        specs = cut_network(greedy, data, find_device(greedy.training.device))
        write_atomically(out / "config.toml", config.to_toml().encode())
        return Comparison(
            label, config.training.max_epochs, _identity(config, label, data), [len(spec.layers) for spec in specs]
        )
    comparison = load_comparison(out)
    all_changed = changed_options(load(out / "config.toml"), config, {"shape", "training", "place"})
    changed = [change for change in all_changed if change[0].key not in FREE]
    if comparison.label != label:
        raise ConfigError(f"{out} compares the label {comparison.label!r}, not {label!r}; name another --out.")
    if changed:
        raise ConfigError(
            f"{listed_changes(changed, f'when {out} was begun')}. Give the old back, or name another --out."
        )
    if comparison.data_identity != _identity(config, label, data):
        raise RunError(
            f"The data set is not the one that {out} was begun on: files or their sizes have changed. Bring the old ones "
            "back, or name another --out."
        )
    return comparison


def _identity(config: Config, label: str, data: DataSet) -> str:
    """Of the data, with the values of the label where a file says them."""
    if not config.data.labels or label not in data.labels:
        return data.identity
    return digest(json.dumps([data.identity, data.labels[label].tolist()]))


def _outcome(
    method: str, seed: int, config: Config, comparison: Comparison, data: DataSet, stop: StopFlag, notify: Notify
) -> Outcome:
    options = config_of(method, seed, config, comparison.label)
    network = build_network(options.net, data.frame_shape, options.training.seed)
    specs = stage_specs(options, data, network, ranges(comparison.cut))
    task = probe_task(comparison.label, data, options)
    if method == UNTRAINED:
        stages = random_stages(specs, [OutputFormat.of(options)] * len(specs), seed)
        return Outcome(method, seed, _errors(options, task, specs, stages, Path(options.out), stop), 0, 0, 0.0)
    cut = None if options.training.stages == 1 else comparison.cut
    result = run(options, UserObjects(cut=cut, data=data), stop=stop, notify=notify)
    weights, origin = load_encoder(result.paths.encoder, result.state.encoder)
    together = OutputFormat(options.training.precision, None)
    output_formats = origin.handings if len(result.state.stages) == len(specs) else [together] * len(specs)
    stages = trained_stages(specs, output_formats, weights)
    errors = _errors(options, task, specs, stages, result.paths.probes, stop)
    records = result.state.stages
    disk = disk_peak(options.cache, cache_sizes(specs, data, options.cache), CachePlan.of(records))
    peak = max(record.peak_bytes or 0 for record in records)
    return Outcome(method, seed, errors, peak, disk, sum(record.seconds for record in records))


def _errors(
    config: Config, task: ProbeTask, specs: list[StageSpec], stages: list[InferenceStage], folder: Path, stop: StopFlag
) -> tuple[float, ...]:
    """Of a linear probe after each module."""
    files, _ = features_under_budget(config, task, stages, folder, stop)
    errors = []
    for spec, features in zip(specs, files, strict=True):
        poll = partial(stop.raise_if_set, f"in the probe of module {spec.stage}")
        error, _ = fit_and_test(features, probe_targets(task, spec), "linear", poll)
        errors.append(error)
        features.close()
    return tuple(errors)

"""Compares the methods of the paper (Löwe et al. 2019, tables 1 and 2): the same data, cut, epochs, seeds and probes.

Each method is a set of options of a run. Every run lies in OUT/runs/METHOD/seed-N, a run directory like any other, and the
outcomes in OUT/compare.json. A second start does only what is missing.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from layerwise.config import Config, changed_options, load, with_options
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.engines.run import UserObjects, run
from layerwise.errors import ConfigError, RunError, did_you_mean
from layerwise.evaluate.classifiers import answer
from layerwise.evaluate.forward import features_under_budget
from layerwise.evaluate.targets import ProbeTask, ask, truth
from layerwise.events import Notify, silent
from layerwise.files import exclusive, write_atomically, write_json
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

GREEDY = "greedy-infomax"
UNTRAINED = "untrained"

METHODS: Mapping[str, Mapping[str, Any]] = {
    GREEDY: {"training.schedule": "sequential"},
    "greedy-infomax-simultaneous": {
        "training.schedule": "simultaneous",
        # Against inputs that never change, which only training one after another has.
        "training.input_noise": 0.0,
        "training.frame_dropout": 0.0,
    },
    "cpc": {"training.schedule": "sequential", "training.stages": 1},
    "greedy-supervised": {"training.schedule": "sequential", "objective.name": "supervised"},
    "supervised": {"training.schedule": "sequential", "training.stages": 1, "objective.name": "supervised"},
    UNTRAINED: {"training.schedule": "sequential"},
}
"""Name to the options in which it differs from a run of one's own; `untrained` is not run at all."""


def config_of(method: str, seed: int, config: Config, label: str, out: str, cache_dir: str) -> Config:
    """The options of one run of a method. Every module of every method is trained for `max_epochs` epochs.

    The budget is for training one stage at a time: what is trained as a whole goes without.
    """
    changes = {"objective.label": ""} | dict(METHODS[method])
    changes |= {"training.seed": seed, "training.patience": config.training.max_epochs}
    changes |= {"out": out, "cache.dir": cache_dir}
    if changes.get("objective.name") == "supervised":
        changes["objective.label"] = label
    if changes.get("training.stages") == 1 or changes.get("training.schedule") == "simultaneous":
        changes |= {"memory.gpu_mem": None, "cache.policy": "never"}
    return with_options(config, changes)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One method with one seed."""

    method: str
    seed: int
    errors: tuple[float, ...]
    """On the test samples, from 0 to 1, of the features after each module."""
    peak_bytes: int
    """Highest of all stages, in training and in caching."""
    disk_bytes: int
    """Most that its caches take at once; where they are compressed, before they are."""
    seconds: float
    """Of training and caching."""


@dataclass(frozen=True, slots=True)
class ModuleError:
    """Over the seeds; the spread is the standard deviation of the sample, 0 where there is one seed."""

    stage: int
    error_mean: float
    error_std: float


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method over its seeds; bytes and seconds are medians."""

    method: str
    seeds: list[int]
    peak_bytes: int
    disk_bytes: int
    seconds: float
    stages: list[ModuleError]


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


@dataclass(slots=True)
class Comparison:
    """compare.json."""

    label: str
    epochs: int
    data_identity: str
    cut: list[int]
    """Layers in each module, of every method; decided at the first start."""
    finished: bool = False
    """Whether the newest start has done what it was asked, and every method has the same seeds."""
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def methods(self) -> list[MethodResult]:
        """In the order of METHODS."""
        by_method = ([each for each in self.outcomes if each.method == method] for method in METHODS)
        return [_over_seeds(outcomes) for outcomes in by_method if outcomes]

    def save(self, path: Path) -> None:
        """Replaces the file atomically. Raises RunError."""
        tree = asdict(self) | {"methods": [asdict(method) for method in self.methods]}
        write_json(path, tree)


def load_comparison(out: Path) -> Comparison:
    """What is known so far. Raises RunError where the folder holds no readable compare.json."""
    try:
        tree = json.loads((out / "compare.json").read_text())
        outcomes = [Outcome(**{**each, "errors": tuple(each["errors"])}) for each in tree["outcomes"]]
        fixed = {name: tree[name] for name in ("label", "epochs", "data_identity", "cut", "finished")}
        return Comparison(**fixed, outcomes=outcomes)
    except FileNotFoundError:
        raise RunError(
            f"{out} holds no comparison; make one with: layerwise compare --out {out} --label NAME."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{out / 'compare.json'} is damaged; move it away and start the same command again.") from None


def compare(
    config: Config,
    label: str,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = tuple(METHODS),
    stop: StopFlag | None = None,
    notify: Notify = silent,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Trains each method with each seed for `training.max_epochs` epochs per module, and probes `label` after each module.

    notify: is told what happens in the runs; tell: of the runs. Raises ConfigError where a method is unknown or the folder
    holds a comparison with other options, RunError where it holds something else or the data have changed, Interrupted
    after saving when asked to stop.
    """
    _check_methods(methods)
    stop, out = stop or StopFlag(), Path(config.out)
    wanted = [(method, seed) for seed in seeds for method in METHODS if method in methods]
    config = with_options(config, {"objective.label": "", "training.seed": 0})  # each run has its own
    data = open_data(config.data, shortest_sample(config))
    _check_request(config, label, data, seeds, methods)
    with exclusive(
        out / "lock", RunError(f"Another process is comparing in {out}; wait for it, or name another --out.")
    ):
        found = _begun(out, config, label, data)
        found.finished = False
        found.save(out / "compare.json")
        for method, seed in wanted:
            if not any((each.method, each.seed) == (method, seed) for each in found.outcomes):
                tell(f"{method}, seed {seed}")
                found.outcomes.append(_outcome(method, seed, config, found, data, stop, notify))
                found.save(out / "compare.json")
            # After a kill in between, the caches of what is known are still there.
            if (_folder(out, method, seed) / "run.json").exists():
                remove_caches(_folder(out, method, seed), None)
        found.finished = len({tuple(sorted(method.seeds)) for method in found.methods}) == 1
        found.save(out / "compare.json")
    return found


def _check_methods(methods: Sequence[str]) -> None:
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ConfigError(
            f"There is no method {unknown[0]!r} to compare; there are {', '.join(METHODS)}.{did_you_mean(unknown[0], METHODS)}"
        )


def _check_request(config: Config, label: str, data: DataSet, seeds: Sequence[int], methods: Sequence[str]) -> None:
    """Refuses what cannot be compared before anything is trained. Raises ConfigError or DataError."""
    if config.data.frames == "whole":
        raise ConfigError(
            "compare trains methods that predict frames from others, and --frames whole makes one of each sample; give "
            "--frames patches or steps."
        )
    if config.objective.name != "infonce":
        raise ConfigError(
            f"--objective {config.objective.name}: the methods of a comparison have objectives of their own; leave it out."
        )
    for seed in seeds:
        ask(label, data, config_of(GREEDY, seed, config, label, config.out, config.cache.dir))
    supervised = [method for method in methods if METHODS[method].get("objective.name") == "supervised"]
    if supervised and label not in data.labels:
        raise ConfigError(
            f"--label {label} is one of frames, which {' and '.join(supervised)} cannot learn; leave them out with --methods."
        )


BEGINNINGS = {"lock", "config.toml", "config.toml.tmp", "compare.json.tmp"}
"""What a comparison may have left that was killed before anything was known."""


def _folder(out: Path, method: str, seed: int) -> Path:
    return out / "runs" / method / f"seed-{seed}"


def _begun(out: Path, config: Config, label: str, data: DataSet) -> Comparison:
    """What an earlier start has left, which must have had the same options and data."""
    if not (out / "compare.json").exists():
        others = sorted(entry.name for entry in out.iterdir() if entry.name not in BEGINNINGS)
        if others:
            raise RunError(f"--out {out} holds something else ({others[0]}); name a new or empty folder.")
        greedy = config_of(GREEDY, config.training.seed, config, label, config.out, config.cache.dir)
        specs = cut_network(greedy, data, find_device(greedy.training.device))
        found = Comparison(label, config.training.max_epochs, data.identity, [len(spec.layers) for spec in specs])
        write_atomically(out / "config.toml", config.to_toml().encode())
        found.save(out / "compare.json")
        return found
    found = load_comparison(out)
    all_changed = changed_options(load(out / "config.toml"), config, {"shape", "training", "place"})
    changed = [change for change in all_changed if change[0].key not in FREE]
    if found.label != label:
        raise ConfigError(f"{out} compares the label {found.label!r}, not {label!r}; name another --out.")
    if changed:
        raise ConfigError(
            f"{listed_changes(changed, f'when {out} was begun')}. Give the old back, or name another --out."
        )
    if found.data_identity != data.identity:
        raise RunError(
            f"The data set is not the one that {out} was begun on: files or their sizes have changed. Bring the old ones "
            "back, or name another --out."
        )
    return found


def _outcome(
    method: str, seed: int, config: Config, compared: Comparison, data: DataSet, stop: StopFlag, notify: Notify
) -> Outcome:
    out = _folder(Path(config.out), method, seed)
    caches = Path(config.cache.dir) / Path(config.out).resolve().name / method
    options = config_of(method, seed, config, compared.label, str(out), str(caches))
    network = build_network(options.net, data.frame_shape, options.training.seed)
    specs = stage_specs(options, data, network, ranges(compared.cut))
    question = ask(compared.label, data, options)
    if method == UNTRAINED:
        stages = random_stages(specs, [OutputFormat.of(options)] * len(specs), seed)
        return Outcome(method, seed, _errors(options, question, specs, stages, out, stop), 0, 0, 0.0)
    cut = None if options.training.stages == 1 else compared.cut
    result = run(options, UserObjects(cut=cut, data=data), stop=stop, notify=notify)
    weights, origin = load_encoder(result.paths.encoder)
    together = OutputFormat(options.training.precision, None)
    handings = origin.handings if len(result.state.stages) == len(specs) else [together] * len(specs)
    stages = trained_stages(specs, handings, weights)
    errors = _errors(options, question, specs, stages, result.paths.probes, stop)
    records = result.state.stages
    cached = CachePlan.of(records)
    disk = disk_peak(options.cache, cache_sizes(specs, data, options.cache), cached) if any(cached.cached) else 0
    peak = max(record.peak_bytes or 0 for record in records)
    return Outcome(method, seed, errors, peak, disk, sum(record.seconds for record in records))


def _errors(
    config: Config,
    question: ProbeTask,
    specs: list[StageSpec],
    stages: list[InferenceStage],
    folder: Path,
    stop: StopFlag,
) -> tuple[float, ...]:
    """Of a linear probe after each module."""
    files, _ = features_under_budget(config, question, stages, folder, stop)
    errors = []
    for spec, features in zip(specs, files, strict=True):
        poll = partial(stop.raise_if_set, f"in the probe of module {spec.stage}")
        errors.append(answer(features, truth(question, spec), "linear", poll).error)
        features.close()
    return tuple(errors)


def _over_seeds(outcomes: list[Outcome]) -> MethodResult:
    errors = list(zip(*(outcome.errors for outcome in outcomes), strict=True))
    return MethodResult(
        method=outcomes[0].method,
        seeds=[outcome.seed for outcome in outcomes],
        peak_bytes=round(statistics.median(outcome.peak_bytes for outcome in outcomes)),
        disk_bytes=round(statistics.median(outcome.disk_bytes for outcome in outcomes)),
        seconds=statistics.median(outcome.seconds for outcome in outcomes),
        stages=[
            ModuleError(stage, statistics.mean(of_stage), statistics.stdev(of_stage) if len(of_stage) > 1 else 0.0)
            for stage, of_stage in enumerate(errors, start=1)
        ],
    )

"""What lies in a run directory, or in that of a comparison, as a report shows it. Only reads."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layerwise.config import Config, load
from layerwise.errors import ConfigError, RunError
from layerwise.files import json_lines
from layerwise.run_store import RunState, RunStore, open_run

COMPARISON = "compare.json"


@dataclass(frozen=True, slots=True)
class Epoch:
    """What metrics.jsonl says of one epoch."""

    epoch: int
    loss: float
    held_out_loss: float


@dataclass(frozen=True, slots=True)
class MemorySample:
    """A line of memory.jsonl."""

    seconds: float
    """Since the stage began."""
    caching: bool
    """In the caching pass, not in training or held-out."""
    live_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """counts[i][j]: test samples of class i that were taken for class j."""

    classes: list[str]
    counts: list[list[int]]


@dataclass(frozen=True, slots=True)
class Probe:
    """A file probes/LABEL.json."""

    label: str
    stages: list[int]
    errors: list[float]
    """From 0 to 1."""
    untrained_errors: list[float]
    confusion: Confusion | None
    """Of the last stage."""
    classifier: str
    """linear or knn."""


@dataclass(frozen=True, slots=True)
class GatheredRun:
    """A run directory."""

    store: RunStore
    state: RunState
    progress: Literal["done", "running", "stopped"]
    config: Config | None
    """None where this layerwise cannot read it."""
    options: str
    """config.toml as it stands."""
    machine: dict[str, Any]
    """Empty where no machine was recorded."""
    epochs: dict[int, list[Epoch]]
    """By stage."""
    memory: dict[int, list[MemorySample]]
    """By stage."""
    probes: list[Probe]


@dataclass(frozen=True, slots=True)
class StageErrors:
    """Mean and standard deviation over seeds, from 0 to 1."""

    stages: list[int]
    means: list[float]
    deviations: list[float]


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a comparison."""

    name: str
    seeds: int
    peak_bytes: int | None
    seconds: float | None
    disk_bytes: int | None
    errors: StageErrors

    def error(self, stage: int) -> str:
        """In percent, for a table, with its spread where there are several seeds; empty where there is no such stage."""
        if stage not in self.errors.stages:
            return ""
        i = self.errors.stages.index(stage)
        spread = f" ± {100 * self.errors.deviations[i]:.1f}" if self.seeds > 1 else ""
        return f"{100 * self.errors.means[i]:.1f}{spread}"


@dataclass(frozen=True, slots=True)
class GatheredComparison:
    """The directory of a comparison."""

    directory: Path
    label: str
    finished: bool
    methods: list[Method]
    runs: dict[str, GatheredRun]
    """By method, the run of its first seed; methods without one are left out."""


def gather(directory: Path) -> GatheredRun | GatheredComparison:
    """Everything that the report of `directory` shows. Raises RunError where it is neither of the two, or damaged."""
    if (directory / COMPARISON).exists():
        return _gather_comparison(directory)
    if directory.is_dir() and not (directory / "run.json").exists():
        raise RunError(
            f"{directory} is neither a run directory (it holds no run.json) nor a comparison (no {COMPARISON}); name "
            "one, or start a run."
        )
    return _gather_run(directory)


def _gather_run(directory: Path) -> GatheredRun:
    store, state = open_run(directory)
    stages = [record.stage for record in state.stages]
    return GatheredRun(
        store=store,
        state=state,
        progress="done" if state.done else "running" if store.is_running else "stopped",
        config=_config(store.config),
        options=store.config.read_text(errors="replace") if store.config.exists() else "",
        machine=_machine(store.machine),
        epochs={stage: list(_epochs(store.metrics(stage))) for stage in stages},
        memory={stage: list(_samples(store.memory(stage))) for stage in stages},
        probes=[_probe(path) for path in sorted(store.probes.glob("*.json"))],
    )


def _config(path: Path) -> Config | None:
    try:
        return load(path)
    except ConfigError:  # missing, or of another version: the report shows its text, or says that there is none
        return None


def _machine(path: Path) -> dict[str, Any]:
    found = _read(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _epochs(path: Path) -> Iterator[Epoch]:
    for entry in json_lines(path):
        try:
            yield Epoch(int(entry["epoch"]), float(entry["loss"]), float(entry["held_out_loss"]))
        except (KeyError, TypeError, ValueError):
            raise _damaged(path) from None


def _samples(path: Path) -> Iterator[MemorySample]:
    for entry in json_lines(path):
        try:
            seconds, live, peak = float(entry["seconds"]), int(entry["live_bytes"]), int(entry["peak_bytes"])
            yield MemorySample(seconds, entry["pass"] == "caching", live, peak)
        except (KeyError, TypeError, ValueError):
            raise _damaged(path) from None


def _probe(path: Path) -> Probe:
    tree = _read(path)
    try:
        stages = tree["stages"]
        return Probe(
            label=path.stem,  # a name of files too, so not what the file says it is
            stages=[int(stage["stage"]) for stage in stages],
            errors=[float(stage["error"]) for stage in stages],
            untrained_errors=[float(stage["untrained_error"]) for stage in stages],
            confusion=_confusion(stages[-1].get("confusion")),
            classifier=str(tree["classifier"]),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise _damaged(path) from None


def _confusion(tree: Any) -> Confusion | None:
    if tree is None:
        return None
    classes = [str(name) for name in tree["classes"]]
    counts = [[int(count) for count in row] for row in tree["counts"]]
    if not classes or [len(row) for row in counts] != [len(classes)] * len(classes):
        raise ValueError("counts is not a square of classes")
    return Confusion(classes, counts)


def _gather_comparison(directory: Path) -> GatheredComparison:
    path = directory / COMPARISON
    tree = _read(path)
    try:
        methods = [_method(entry) for entry in tree["methods"]]
        label, finished = str(tree["label"]), bool(tree.get("finished", True))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _damaged(path) from None
    runs = {method.name: run for method in methods if (run := _first_run(directory, method.name)) is not None}
    return GatheredComparison(directory, label, finished, methods, runs)


def _method(tree: Any) -> Method:
    seeds, stages = tree["seeds"], tree["stages"]
    return Method(
        name=str(tree["method"]),
        seeds=len(seeds) if isinstance(seeds, list) else int(seeds),
        peak_bytes=tree.get("peak_bytes"),
        seconds=tree.get("seconds"),
        disk_bytes=tree.get("disk_bytes"),
        errors=StageErrors(
            [int(stage["stage"]) for stage in stages],
            [float(stage["error_mean"]) for stage in stages],
            [float(stage["error_std"] or 0) for stage in stages],
        ),
    )


def _first_run(directory: Path, method: str) -> GatheredRun | None:
    folders = sorted(directory.glob("runs/*/seed-*"), key=lambda folder: (len(folder.name), folder.name))
    of_method = [folder for folder in folders if folder.parent.name == method and (folder / "run.json").exists()]
    return _gather_run(of_method[0]) if of_method else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise _damaged(path) from None


def _damaged(path: Path) -> RunError:
    return RunError(f"{path} is damaged; what wrote it writes it anew, or move it away and make the report again.")

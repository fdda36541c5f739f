"""What lies in a run directory, or in that of a comparison, as a report shows it. Only reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from layerwise.config import Config, load
from layerwise.errors import ConfigError, RunError
from layerwise.files import is_locked, json_lines
from layerwise.run_store import RunState, RunStore, StageRecord, open_run

COMPARISON = "compare.json"


class _Record(BaseModel):
    """An object of a JSON file; what else the file says of it is left out."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)


class Epoch(_Record):
    """A line of metrics.jsonl."""

    epoch: int
    loss: float
    held_out_loss: float


class MemorySample(_Record):
    """A line of memory.jsonl."""

    seconds: float
    """Since the stage began."""
    phase: str = Field(alias="pass")
    """training, held-out or caching."""
    live_bytes: int
    peak_bytes: int


class Confusion(_Record):
    """counts[i][j]: test samples of class i that were taken for class j."""

    classes: list[str] = Field(min_length=1)
    counts: list[list[int]]

    @model_validator(mode="after")
    def _square(self) -> "Confusion":
        if [len(row) for row in self.counts] != [len(self.classes)] * len(self.classes):
            raise ValueError("counts is not a square of classes")
        return self


class ProbedStage(_Record):
    """Errors from 0 to 1."""

    stage: int
    error: float
    untrained_error: float
    confusion: Confusion | None = None


class Probe(_Record):
    """A file probes/LABEL.json."""

    label: str
    """As the file is named."""
    classifier: str
    """linear or knn."""
    stages: list[ProbedStage] = Field(min_length=1)


class ModuleError(_Record):
    """Over the seeds, from 0 to 1."""

    stage: int
    error_mean: float
    error_std: float | None


class Method(_Record):
    """A method of a comparison."""

    name: str = Field(alias="method")
    seeds: list[int]
    peak_bytes: float | None = None
    seconds: float | None = None
    disk_bytes: float | None = None
    stages: list[ModuleError]

    def error(self, stage: int) -> str:
        """In percent, for a table, with its spread where there are several seeds; empty where there is no such stage."""
        for entry in self.stages:
            if entry.stage == stage:
                spread = f" ± {100 * (entry.error_std or 0):.1f}" if len(self.seeds) > 1 else ""
                return f"{100 * entry.error_mean:.1f}{spread}"
        return ""


class _ComparisonFile(_Record):
    """compare.json."""

    label: str
    finished: bool = True
    methods: list[Method]


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
        machine=_read(dict[str, Any], store.machine) if store.machine.exists() else {},
        epochs={stage: _read(list[Epoch], store.metrics(stage)) for stage in stages},
        memory={stage: _read(list[MemorySample], store.memory(stage)) for stage in stages},
        # A label is a name of files too, so the file does not say which it is.
        probes=[
            _read(Probe, path).model_copy(update={"label": path.stem}) for path in sorted(store.probes.glob("*.json"))
        ],
    )


def _config(path: Path) -> Config | None:
    try:
        return load(path)
    except ConfigError:  # missing, or of another version: the report shows its text, or says that there is none
        return None


def _gather_comparison(directory: Path) -> GatheredComparison:
    file = _read(_ComparisonFile, directory / COMPARISON)
    runs = {method.name: run for method in file.methods if (run := _first_run(directory, method.name)) is not None}
    return GatheredComparison(directory, file.label, file.finished, file.methods, runs)


def _first_run(directory: Path, method: str) -> GatheredRun | None:
    folders = sorted(directory.glob("runs/*/seed-*"), key=lambda folder: (len(folder.name), folder.name))
    of_method = [folder for folder in folders if folder.parent.name == method and (folder / "run.json").exists()]
    return _gather_run(of_method[0]) if of_method else None


Content = TypeVar("Content")


def _read(kind: type[Content], path: Path) -> Content:
    """A JSON file, or the objects of a file of JSON lines. Raises RunError where it is no `kind`."""
    try:
        content = json_lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
        return TypeAdapter(kind).validate_python(content)
    except ValueError:
        raise RunError(
            f"{path} is damaged; what wrote it writes it anew, or move it away and make the report again."
        ) from None


@dataclass(frozen=True, slots=True)
class RoundState:
    """A round of a run as the disk has it."""

    number: int
    stages: list[StageRecord]
    worker: str | None
    """Who performs a task of it now; None where nobody does."""


def round_states(store: RunStore, rounds: int) -> list[RoundState]:
    """Every round that is prepared, in order. Raises RunError where one cannot be read."""
    states = []
    for number in range(1, rounds + 1):
        of_round = store.round(number, rounds)
        if of_round.state.exists():
            worker = of_round.task_lock.read_text().strip() if is_locked(of_round.task_lock) else None
            states.append(RoundState(number, RunState.load(of_round.state).stages, worker))
    return states


def published_version(states: Sequence[RoundState], stage: int) -> int:
    """The newest version of a stage's outputs: the round that it was done in last; 0 where there is none."""
    return max((state.number for state in states if state.stages[stage - 1].status == "done"), default=0)

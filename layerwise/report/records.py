"""What lies in a run directory, or in that of a comparison, as a report shows it. Only reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter

from layerwise.config import Config, load
from layerwise.errors import ConfigError, RunError
from layerwise.evaluate.results import COMPARISON, Comparison, ProbeResult
from layerwise.files import json_lines
from layerwise.run_store import RunState, RunStore, StageRecord, open_run


@dataclass(frozen=True, slots=True)
class Epoch:
    """A line of metrics.jsonl, as far as it is shown."""

    epoch: int
    loss: float
    held_out_loss: float


@dataclass(frozen=True, slots=True)
class MemorySample:
    """A line of memory.jsonl."""

    seconds: float
    """Since the stage began."""
    phase: Annotated[str, Field(alias="pass")]
    """training, held-out or caching."""
    live_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class GatheredRun:
    """A run directory."""

    store: RunStore
    state: RunState
    progress: str
    """done, running or stopped."""
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
    probes: list[ProbeResult]
    """Their labels are those of the files' names."""


def gather_run(directory: Path) -> GatheredRun:
    """Everything that the report of a run shows. Raises RunError where the directory is none, or damaged."""
    if directory.is_dir() and not (directory / "run.json").exists():
        raise RunError(
            f"{directory} is neither a run directory (it holds no run.json) nor a comparison (no {COMPARISON}); name "
            "one, or start a run."
        )
    store, state = open_run(directory)
    stages = [record.stage for record in state.stages]
    return GatheredRun(
        store=store,
        state=state,
        progress=progress(store, state),
        config=_config(store.config),
        options=store.config.read_text(encoding="utf-8", errors="replace") if store.config.exists() else "",
        machine=_read(dict[str, Any], store.machine) if store.machine.exists() else {},
        epochs={stage: _read(list[Epoch], store.metrics(stage)) for stage in stages},
        memory={stage: _read(list[MemorySample], store.memory(stage)) for stage in stages},
        probes=[replace(_read(ProbeResult, path), label=path.stem) for path in sorted(store.probes.glob("*.json"))],
    )


def _config(path: Path) -> Config | None:
    try:
        return load(path)
    except ConfigError:  # missing, or of another version: the report shows its text, or says that there is none
        return None


def read_comparison(directory: Path) -> Comparison:
    """Raises RunError where compare.json is damaged."""
    return _read(Comparison, directory / COMPARISON)


def first_runs(directory: Path, comparison: Comparison) -> dict[str, GatheredRun]:
    """By method, the run of its first seed; methods without one are left out. Raises RunError where one is damaged."""
    runs = {}
    for method in comparison.methods:
        seeds = (directory / "runs" / method.method / f"seed-{seed}" for seed in sorted(method.seeds))
        if first := next((folder for folder in seeds if (folder / "run.json").exists()), None):
            runs[method.method] = gather_run(first)
    return runs


Content = TypeVar("Content")


def _read(kind: type[Content], path: Path) -> Content:
    """A JSON file, or the objects of a file of JSON lines. Raises RunError where it is no `kind`."""
    try:
        content = json_lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
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
        if of_round.exists:
            states.append(RoundState(number, of_round.load_state().stages, of_round.worker()))
    return states


def progress(store: RunStore, state: RunState, rounds: Sequence[RoundState] = ()) -> str:
    """done; running, where a process holds the run, or a task of it or of one of these rounds; or stopped."""
    if state.done:
        return "done"
    at_work = store.is_running or store.worker() is not None or any(each.worker for each in rounds)
    return "running" if at_work else "stopped"


def published_version(states: Sequence[RoundState], stage: int) -> int:
    """The newest version of a stage's outputs: the round that it was done in last; 0 where there is none."""
    return max((state.number for state in states if state.stages[stage - 1].status == "done"), default=0)

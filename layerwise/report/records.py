"""What lies in a run directory, or in that of a comparison, as a report shows it. Only reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter

from layerwise.config import changed_options
from layerwise.errors import RunError
from layerwise.evaluate.results import COMPARISON, Comparison
from layerwise.files import json_lines
from layerwise.records import Count, Share, read_record
from layerwise.run_store import ProbeResult, RunState, RunStore, StageRecord, open_run


@dataclass(frozen=True, slots=True)
class Epoch:
    """A line of metrics.jsonl, as far as it is shown."""

    epoch: Count
    loss: float
    held_out_loss: float
    probe_error: Share | None = None


@dataclass(frozen=True, slots=True)
class MemorySample:
    """A line of memory.jsonl."""

    seconds: float
    """Since the stage began."""
    phase: Annotated[str, Field(alias="pass")]
    """training, held-out or caching."""
    live_bytes: Count
    peak_bytes: Count


@dataclass(frozen=True, slots=True)
class GatheredRun:
    """A run directory."""

    store: RunStore
    state: RunState
    progress: str
    """done, running or stopped."""
    machine: dict[str, Any]
    """Empty where no machine was recorded."""
    epochs: dict[int, list[Epoch]]
    """By stage."""
    memory: dict[int, list[MemorySample]]
    """By stage."""
    probes: list[ProbeResult]
    """Their labels are those of the files' names."""

    @property
    def missing(self) -> list[Path]:
        """Records of stages that have trained, which are there no more."""
        trained = [record.stage for record in self.state.stages if record.epochs]
        records = [of_stage(stage) for stage in trained for of_stage in (self.store.metrics, self.store.memory)]
        return [path for path in records if not path.exists()]


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
        machine=read_record(dict[str, Any], store.machine) if store.machine.exists() else {},
        epochs={stage: _read(Epoch, store.metrics(stage)) for stage in stages},
        memory={stage: _read(MemorySample, store.memory(stage)) for stage in stages},
        probes=store.read_probes(state),
    )


def first_runs(directory: Path, comparison: Comparison) -> dict[str, GatheredRun]:
    """By method, the run of its first seed; methods without one are left out. Raises RunError where one is damaged."""
    runs = {}
    for method in comparison.methods:
        seeds = (directory / "runs" / method.method / f"seed-{seed}" for seed in sorted(method.seeds))
        if first := next((folder for folder in seeds if (folder / "run.json").exists()), None):
            runs[method.method] = gather_run(first)
    return runs


Line = TypeVar("Line")


def _read(kind: type[Line], path: Path) -> list[Line]:
    """The objects of a file of JSON lines. Raises RunError where one is no `kind`."""
    try:
        return TypeAdapter(list[kind]).validate_python(json_lines(path))  # type: ignore[valid-type]
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


def round_states(store: RunStore, state: RunState) -> list[RoundState]:
    """Every round that is prepared, in order; an empty list where the run has a single one. state: of the run.

    Raises RunError where one cannot be read, or is another's.
    """
    rounds, states = state.config.training.rounds, []
    for number in range(1, rounds + 1) if rounds > 1 else ():
        of_round = store.round(number, rounds)
        if of_round.exists:
            found = of_round.load_state()
            misplaced = Path(found.caches).name != of_round.caches.name and number < rounds
            if misplaced or changed_options(found.config, state.config, {"shape"}):
                raise RunError(f"{of_round.state} is not of this run; restore it, or begin anew with --overwrite.")
            states.append(RoundState(number, found.stages, of_round.worker()))
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

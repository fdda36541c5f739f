"""The tables of a run and of a probe, and what to type next.

The table of a plan, and what it comes to.

All stages of a run in rounds at once: what each is at, which version it has published, how far it is behind."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from layerwise.config import ObjectiveOptions
from layerwise.forecast import Forecast
from layerwise.report.progress import outcome
from layerwise.run_store import RunState, RunStore, StageRecord
from layerwise.units import duration, percent, size

if TYPE_CHECKING:
    from layerwise.evaluate.compare import Comparison
    from layerwise.evaluate.probe import ProbeResult

FEW_TEST_SAMPLES = 50

WIDTH_OF_FILES = 140
"""Columns of text where it does not go to a terminal."""


def console_for_results() -> Console:
    """Standard output, wide enough for the tables where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_FILES)


def stage_table(state: RunState) -> Table:
    """One row per stage, within 80 columns; the loss is the lowest held-out one."""
    shown = table("stage", "status", "loss", "train peak", "cache peak", "cache", "time")
    shown.collapse_padding = True
    for record in state.stages:
        shown.add_row(
            str(record.stage),
            stage_status(record),
            f"{record.best_loss:.4f}" if record.best_loss is not None else "",
            size(record.train_peak_bytes),
            size(record.cache_peak_bytes),
            "missing" if record.cache and not Path(record.cache).exists() else size(record.cache_bytes),
            duration(record.seconds) if record.seconds else "",
        )
    return shown


def stage_status(record: StageRecord) -> str:
    """How far a stage is, and after how many epochs."""
    if record.status == "done":
        return outcome(record.epochs, record.converged)
    return f"{record.status} ({record.epochs})" if record.epochs else record.status


def stages_at_chance(state: RunState, objective: ObjectiveOptions) -> str | None:
    """A sentence where a stage tells its target from the negatives no better than a guess does."""
    # The loss where all scores are 0; that of other objectives is not known here.
    chance = {"infonce": math.log(1 + objective.negatives), "hinge": 2.0}.get(objective.name, math.inf)
    stages = [str(r.stage) for r in state.stages if r.best_loss is not None and r.best_loss > 0.995 * chance]
    if not stages:
        return None
    which = f"Stage {stages[0]}" if len(stages) == 1 else f"Stages {', '.join(stages)}"
    return f"{which} did not get clearly below chance, a loss of {chance:.3f}: train longer, or raise --lr."


def few_test_samples(result: "ProbeResult") -> str | None:
    """A sentence where the errors are too coarse to be compared."""
    test = min(stage.test for stage in result.stages)
    return f"Only {test} test samples: one of them is {percent(1 / test)}." if test < FEW_TEST_SAMPLES else None


def totals(state: RunState) -> str:
    """The largest peak against the budget, the room of the caches, the time."""
    peak = max((record.peak_bytes or record.train_peak_bytes or 0 for record in state.stages), default=0)
    of_budget = f" of {size(state.budget_bytes)}" if state.budget_bytes else ""
    caches = sum(record.cache_bytes or 0 for record in state.stages)
    seconds = sum(record.seconds for record in state.stages)
    return f"device peak {size(peak)}{of_budget} on {state.device}, caches {size(caches)}, {duration(seconds)}"


def where_things_lie(store: RunStore, state: RunState) -> list[str]:
    """Lines of name and path."""
    caches = [f"caches    {_as_typed(store.caches)}/stage-S.h5"] if any(r.cache for r in state.stages) else []
    return [
        f"encoder   {store.encoder}",
        f"weights   {store.out / 'stages'}/S/weights.safetensors, metrics.jsonl beside them",
        *caches,
        f"options   {store.config}",
        f"log       {store.log}",
    ]


def _as_typed(path: Path) -> Path:
    """Relative to this folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def what_next(store: RunStore, labels: list[str]) -> list[str]:
    """Commands that make sense now."""
    out = shlex.quote(str(store.out))
    probes = [f"layerwise probe {out} --label {shlex.quote(label)}" for label in labels]
    return [
        *probes,
        f"layerwise report {out}",
        f"layerwise status {out}",
        f"layerwise run --out {out} … --from-stage S   to retrain from stage S on",
    ]


def probe_table(result: "ProbeResult") -> Table:
    """Error of each stage beside its untrained twin."""
    shown = table("stage", f"{result.label} error", "random weights", "train", "test")
    for stage in result.stages:
        shown.add_row(
            str(stage.stage), percent(stage.error), percent(stage.untrained_error), str(stage.train), str(stage.test)
        )
    return shown


def comparison_table(comparison: "Comparison") -> Table:
    """Test error after each module, mean and spread over the seeds, and what each method took."""
    modules = max((len(method.stages) for method in comparison.methods), default=0)
    shown = table("method", *(str(number) for number in range(1, modules + 1)), "peak", "disk", "time")
    for method in comparison.methods:
        errors = [
            percent(stage.error_mean) + (f" ±{100 * stage.error_std:.1f}" if len(method.seeds) > 1 else "")
            for stage in method.stages
        ]
        took = [size(method.peak_bytes), size(method.disk_bytes), duration(method.seconds)]
        shown.add_row(method.method, *errors, *(took if method.peak_bytes else ["", "", ""]))
    return shown


def table(*names: str) -> Table:
    """An empty table in the style of all of them."""
    empty = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        empty.add_column(name, no_wrap=True)
    return empty


def forecast_table(forecast: Forecast) -> Table:
    """One row per stage, and one for all of them."""
    shown = table("stage", "parameters", "train peak", "cache peak", "layout", "input", "cache", "host", "")
    shown.collapse_padding = True
    for stage in forecast.stages:
        shown.add_row(
            str(stage.stage),
            f"{stage.parameters:,}",
            size(stage.train_peak_bytes),
            size(stage.cache_peak_bytes),
            stage.layout,
            stage.input,
            size(stage.cache_bytes) if stage.cached else f"({size(stage.cache_bytes)})",
            size(stage.host_bytes),
            "" if forecast.budget_bytes is None else "fits" if stage.fits else "too large",
        )
    shown.add_row(
        "all",
        f"{sum(stage.parameters for stage in forecast.stages):,}",
        size(max(stage.train_peak_bytes for stage in forecast.stages)),
        size(max(stage.cache_peak_bytes for stage in forecast.stages)),
        "",
        "",
        size(forecast.cache_bytes),
        size(forecast.host_bytes),
        "",
    )
    return shown


def reasons(forecast: Forecast) -> list[str]:
    """Why stages are not laid out in the cheapest way, and what is not cached."""
    return forecast.notes + [
        f"stage {stage.stage}: {stage.layout}, because {stage.why}" for stage in forecast.stages if stage.why
    ]


def verdict(forecast: Forecast) -> str:
    """Whether the budget holds, and the smallest that would."""
    smallest = f"the smallest budget for this cut is {exact(forecast.smallest_budget_bytes)}"
    peak = f"device peak {size(forecast.peak_bytes)} on {forecast.device}"
    if forecast.budget_bytes is None:
        return f"{peak}; {smallest}"
    if forecast.fits:
        return f"fits: {peak} of {size(forecast.budget_bytes)}; {smallest}"
    return f"--gpu-mem {size(forecast.budget_bytes)} is too small; {smallest}"


def disk(forecast: Forecast) -> str:
    """What the caches take."""
    of = "" if forecast.disk_budget_bytes is None else f" of {size(forecast.disk_budget_bytes)}"
    return f"caches take {size(forecast.disk_bytes)}{of} at once"


def exact(count: int) -> str:
    """Bytes as an option that is large enough: rounded up, never down."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{-(-count * 100 // unit) / 100:g}{name}"
    return f"{count}B"


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


def published(states: Sequence[RoundState], stage: int) -> int:
    """The newest version of a stage's outputs: the round that it was done in last; 0 where there is none."""
    return max((state.number for state in states if state.stages[stage - 1].status == "done"), default=0)


def rounds_table(states: Sequence[RoundState], rounds: int) -> Table:
    """One row per stage, within 100 columns."""
    shown = table("stage", "status", "round", "version", "behind", "loss", "worker")
    for stage in range(1, len(states[0].stages) + 1):
        version = published(states, stage)
        # In hand is the round behind the version; where all are done, the last one.
        here = next((state for state in states if state.number == min(version + 1, rounds)), states[-1])
        record = here.stages[stage - 1]
        behind = published(states, 1) - version
        shown.add_row(
            str(stage),
            stage_status(record) if record.status != "pending" or version == 0 else "waiting",
            f"{here.number} of {rounds}",
            str(version or "-"),
            _rounds(behind),
            f"{record.best_loss:.4f}" if record.best_loss is not None else "",
            here.worker if here.worker and record.status in ("training", "caching") else "",
        )
    return shown


def _rounds(count: int) -> str:
    return "" if not count else f"{count} round" if count == 1 else f"{count} rounds"

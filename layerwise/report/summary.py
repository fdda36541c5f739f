"""The tables of a run and of a probe, and what to type next."""

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from layerwise.config import ObjectiveOptions
from layerwise.report.lines import outcome
from layerwise.run_directory import RunPaths, RunState, StageRecord
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


def where_things_lie(paths: RunPaths, state: RunState) -> list[str]:
    """Lines of name and path."""
    caches = [f"caches    {_as_typed(paths.caches)}/stage-S.h5"] if any(r.cache for r in state.stages) else []
    return [
        f"encoder   {paths.encoder}",
        f"weights   {paths.out / 'stages'}/S/weights.safetensors, metrics.jsonl beside them",
        *caches,
        f"options   {paths.config}",
        f"log       {paths.log}",
    ]


def _as_typed(path: Path) -> Path:
    """Relative to this folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def what_next(paths: RunPaths, labels: list[str]) -> list[str]:
    """Commands that make sense now."""
    out = shlex.quote(str(paths.out))
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

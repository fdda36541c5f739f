"""What commands print on standard output: tables of stages, forecasts, probes and comparisons, and sentences on them."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from layerwise.config import Config, ObjectiveOptions, flags_elsewhere, function_flags
from layerwise.evaluate.results import Comparison
from layerwise.forecast import Forecast
from layerwise.report.progress import outcome
from layerwise.report.records import RoundState, published_version
from layerwise.run_store import ProbeResult, RunState, RunStore, StageRecord
from layerwise.units import duration, percent, size

FEW_TEST_SAMPLES = 50

TIMES_OF_A_SWEEP = (
    "The times are of all epochs at the full speed of the device: they compare cuts, and a run takes longer."
)


def table(rows: Iterable[Mapping[str, str]], **style: Any) -> Table:
    """Each row maps names of columns to cells; the first row has every column, and a cell that is left out stays empty."""
    rows = list(rows)
    names = list(rows[0]) if rows else []
    shown = Table(box=None, pad_edge=False, header_style="bold", **style)
    for name in names:
        shown.add_column(name, no_wrap=True)
    for row in rows:
        shown.add_row(*(row.get(name, "") for name in names))
    return shown


def stage_table(state: RunState, store: RunStore) -> Table:
    """One row per stage, within 80 columns; the loss is the lowest held-out one."""
    rows = (
        {
            "stage": str(record.stage),
            "status": stage_status(record),
            "loss": _loss(record),
            "train peak": size(record.train_peak_bytes),
            "cache peak": size(record.cache_peak_bytes),
            "cache": "missing" if record.cache and not store.cache(record.stage).exists() else size(record.cache_bytes),
            "time": duration(record.seconds) if record.seconds else "",
        }
        for record in state.stages
    )
    return table(rows, collapse_padding=True)


def rounds_table(states: Sequence[RoundState], rounds: int) -> Table:
    """One row per stage, within 100 columns; states: of the rounds that are prepared."""
    return table(_row_of_rounds(states, rounds, stage) for stage in range(1, len(states[0].stages) + 1))


def _row_of_rounds(states: Sequence[RoundState], rounds: int, stage: int) -> dict[str, str]:
    version = published_version(states, stage)
    behind = published_version(states, 1) - version
    # In hand is the round behind the version; where all are done, the last one.
    current = next((state for state in states if state.number == min(version + 1, rounds)), states[-1])
    record = current.stages[stage - 1]
    return {
        "stage": str(stage),
        "status": stage_status(record) if record.status != "pending" or version == 0 else "waiting",
        "round": f"{current.number} of {rounds}",
        "version": str(version or "-"),
        "behind": f"{behind} round{'' if behind == 1 else 's'}" if behind else "",
        "loss": _loss(record),
        "worker": current.worker if current.worker and record.status in ("training", "caching") else "",
    }


def _loss(record: StageRecord) -> str:
    return f"{record.best_loss:.4f}" if record.best_loss is not None else ""


def stage_status(record: StageRecord) -> str:
    """How far a stage is, and after how many epochs."""
    if record.status == "done":
        return outcome(record.epochs, record.converged)
    return f"{record.status} ({record.epochs})" if record.epochs else record.status


def stages_at_chance(state: RunState, objective: ObjectiveOptions) -> str | None:
    """A sentence where a stage tells its target from the negatives no better than a guess does."""
    best = [(record.stage, record.best_loss) for record in state.stages]
    stages = [str(stage) for stage, loss in best if loss is not None and objective.is_at_chance(loss)]
    if not stages:
        return None
    which = f"Stage {stages[0]}" if len(stages) == 1 else f"Stages {', '.join(stages)}"
    return (
        f"{which} did not get clearly below chance, a loss of {objective.chance_loss:.3f}: train longer, or raise --lr."
    )


def totals(state: RunState) -> str:
    """The largest peak against the budget, the room of the caches, the time."""
    of_budget = f" of {size(state.budget_bytes)}" if state.budget_bytes else ""
    caches = sum(record.cache_bytes or 0 for record in state.stages)
    seconds = sum(record.seconds for record in state.stages)
    return f"device peak {size(_peak(state))}{of_budget} on {state.device}, caches {size(caches)}, {duration(seconds)}"


def headline(state: RunState, probes: Sequence[ProbeResult]) -> list[tuple[str, str]]:
    """What a reader of a run wants to know first: name and value of each result."""
    results = []
    for probe in probes:
        last = probe.stages[-1]
        others = [f"{percent(last.untrained_error)} with random weights"]
        if probe.baseline:
            others.append(f"{percent(probe.baseline.error)} with {probe.baseline.name}")
        told = f"{percent(last.error)} after module {last.stage}; {', '.join(others)}"
        worse = no_better(probe)
        results.append((f"error, {probe.label}", f"{told}. {worse}" if worse else told))
    budget = f" of {size(state.budget_bytes)}" if state.budget_bytes else ", without a budget"
    results.append(("device peak", f"{size(_peak(state))}{budget}, on {state.device}"))
    results.append(("time", duration(sum(record.seconds for record in state.stages))))
    results.append(("caches", size(sum(record.cache_bytes or 0 for record in state.stages))))
    return results


def _peak(state: RunState) -> int:
    return max((record.peak_bytes or record.train_peak_bytes or 0 for record in state.stages), default=0)


def where_things_lie(store: RunStore, state: RunState) -> list[str]:
    """Lines of name and path."""
    caches = store.caches
    if caches.is_relative_to(Path.cwd()):
        caches = caches.relative_to(Path.cwd())  # as it was typed
    return [
        f"encoder   {store.encoder}",
        f"weights   {store.out / 'stages'}/S/weights.safetensors, metrics.jsonl beside them",
        *([f"caches    {caches}/stage-S.h5"] if any(record.cache for record in state.stages) else []),
        f"options   {store.config}",
        f"log       {store.log}",
    ]


def what_next(store: RunStore, labels: Iterable[str], config: Config) -> list[str]:
    """Commands that make sense now."""
    out = shlex.quote(str(store.out))
    flags = [word for label in labels for word in ("--label", label)]
    return [
        *([shlex.join(["layerwise", "probe", str(store.out), *flags, *function_flags(config)])] if flags else []),
        f"layerwise report {out}",
        f"layerwise status {out}",
    ]


def more_epochs(store: RunStore, state: RunState) -> list[str]:
    """Lines on the command that trains a finished run further; none where all stages have converged, or cannot go on."""
    config = state.config
    if config.training.rounds > 1 or config.training.cosine or all(record.converged for record in state.stages):
        return []
    more = ["--max-epochs", str(2 * config.training.max_epochs)]
    flags = [*more, *function_flags(config), *flags_elsewhere(config)]
    command = shlex.join(["layerwise", "run", "--out", str(store.out), *flags])
    return ["more epochs, from where the stages stand:", f"  {command}"]


def forecast_table(forecast: Forecast) -> Table:
    """One row per stage, and one for all of them, within 80 columns. GFLOP and moved: of an optimizer step of each."""
    stages = forecast.stages
    rows = [
        {
            "stage": str(stage.stage),
            "parameters": f"{stage.parameters:,}",
            "train peak": size(stage.train_peak_bytes),
            "cache peak": size(stage.cache_peak_bytes),
            "GFLOP": _giga(stage.flops),
            "moved": size(stage.moved_bytes),
            "input": stage.input,
            "cache": size(stage.cache_bytes) if stage.cached else f"({size(stage.cache_bytes)})",
            "host": size(stage.host_bytes),
            "fits": "" if forecast.budget_bytes is None else "yes" if stage.fits else "no",
        }
        for stage in stages
    ]
    together = {
        "stage": "all",
        "parameters": f"{sum(stage.parameters for stage in stages):,}",
        "train peak": size(max(stage.train_peak_bytes for stage in stages)),
        "cache peak": size(max(stage.cache_peak_bytes for stage in stages)),
        "GFLOP": _giga(sum(stage.flops for stage in stages)),
        "moved": size(sum(stage.moved_bytes for stage in stages)),
        "cache": size(forecast.cache_bytes),
        "host": size(forecast.host_bytes),
    }
    return table([*rows, together], collapse_padding=True)


def sweep_table(forecasts: Sequence[Forecast]) -> Table:
    """One row per cut, within 80 columns. GFLOP and moved: of an optimizer step of every stage; time: of all epochs."""
    rows = (
        {
            "stages": "1, end to end" if len(each.stages) == 1 else str(len(each.stages)),
            "smallest budget": _rounded_up(each.smallest_budget_bytes),
            "peak": size(each.peak_bytes),
            "GFLOP": _giga(each.flops),
            "moved": size(each.moved_bytes),
            "disk": size(each.disk_bytes),
            "time": duration(3600 * each.hours),
            "fits": "" if each.budget_bytes is None else "yes" if each.fits else "no",
        }
        for each in forecasts
    )
    return table(rows, collapse_padding=True)


def cheapest_cut(forecasts: Sequence[Forecast]) -> str:
    """A sentence on which cut takes the least time of those that the budget holds."""
    fitting, budget = [each for each in forecasts if each.fits], forecasts[0].budget_bytes
    under = "without a budget" if budget is None else f"under --gpu-mem {size(budget)}"
    if not fitting:
        least = min(each.smallest_budget_bytes for each in forecasts)
        return f"No cut fits {under}; the smallest budget of all is {_rounded_up(least)}."
    best = min(fitting, key=lambda each: each.hours)
    count = len(best.stages)
    which = "1 stage, which is end-to-end training" if count == 1 else f"{count} stages"
    return f"The least time {under}: {which} (--stages {count}), {duration(3600 * best.hours)}."


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.3g}"


def forecast_lines(forecast: Forecast) -> list[str]:
    """What is not cached; layouts that are not the cheapest, and why; the room of the caches; whether the budget holds."""
    of_disk = "" if forecast.disk_budget_bytes is None else f" of {size(forecast.disk_budget_bytes)}"
    smallest = f"the smallest budget for this cut is {_rounded_up(forecast.smallest_budget_bytes)}"
    peak = f"device peak {size(forecast.peak_bytes)} on {forecast.device}"
    if forecast.budget_bytes is None:
        verdict = f"{peak}; {smallest}"
    elif forecast.fits:
        verdict = f"fits: {peak} of {size(forecast.budget_bytes)}; {smallest}"
    else:
        verdict = f"--gpu-mem {size(forecast.budget_bytes)} is too small; {smallest}"
    return [
        *forecast.notes,
        *(
            f"stage {stage.stage}: {stage.layout}" + (f", because {stage.why}" if stage.why else "")
            for stage in forecast.stages
            if stage.why or stage.layout != "whole batch"
        ),
        f"caches take {size(forecast.disk_bytes)}{of_disk} at once",
        verdict,
    ]


def _rounded_up(count: int) -> str:
    """Bytes as a value of --gpu-mem that is large enough: never rounded down."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{-(-count * 100 // unit) / 100:g}{name}"
    return f"{count}B"


def probe_table(result: ProbeResult) -> Table:
    """Error of each stage beside its untrained twin; below them that of features which nobody has learnt."""
    error = f"{result.label} error"
    rows = [
        {
            "stage": str(stage.stage),
            error: percent(stage.error),
            "random weights": percent(stage.untrained_error),
            "train": str(stage.train),
            "test": str(stage.test),
        }
        for stage in result.stages
    ]
    if result.baseline:
        rows.append({"stage": result.baseline.name, error: percent(result.baseline.error)})
    return table(rows)


def few_test_samples(result: ProbeResult) -> str | None:
    """A sentence where the errors are too coarse to be compared."""
    test = min(stage.test for stage in result.stages)
    return f"Only {test} test samples: one of them is {percent(1 / test)}." if test < FEW_TEST_SAMPLES else None


def no_better(result: ProbeResult) -> str | None:
    """A sentence where the last module tells the label no better than what nobody has trained."""
    last, baseline = result.stages[-1], result.baseline
    others = ["the same network with random weights"] if last.error >= last.untrained_error else []
    if baseline and last.error >= baseline.error:
        others.append(baseline.name)
    if not others:
        return None
    return f"Module {last.stage} tells {result.label} no better than {' and than '.join(others)}."


def comparison_table(comparison: Comparison) -> Table:
    """Test error after each module, mean and spread over the seeds, and what each method took."""
    rows = []
    for method in comparison.methods:
        row = {"method": method.method}
        for stage in method.stages:
            spread = f" ±{100 * stage.error_std:.1f}" if len(method.seeds) > 1 else ""
            row[str(stage.stage)] = f"{percent(stage.error_mean)}{spread}"
        took = [size(method.peak_bytes), size(method.disk_bytes), duration(method.seconds)]
        rows.append(row | dict(zip(("peak", "disk", "time"), took if method.peak_bytes else [""] * 3, strict=True)))
    return table(rows)

"""The figures of a report. Each function draws one, or gives None where there is nothing to draw."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from layerwise.evaluate.results import Comparison, MethodResult, ModuleError
from layerwise.forecast import Forecast
from layerwise.report.drawing import BLUE, BYTES, GRAY, GREEN, INK, OCHRE, ORANGE, PERCENT, PINK, Plot, new_figure
from layerwise.report.records import Epoch, GatheredRun, MemorySample
from layerwise.run_store.state import Confusion, ProbeResult
from layerwise.units import size

STYLES = {
    "greedy-infomax": (BLUE, "o"),
    "greedy-infomax-simultaneous": (GREEN, "s"),
    "cpc": (ORANGE, "^"),
    "greedy-supervised": (PINK, "D"),
    "supervised": (OCHRE, "v"),
    "cpc-converged": (ORANGE, "<"),
    "supervised-converged": (OCHRE, ">"),
    "untrained": (GRAY, "X"),
}
"""Colour and marker of a method, the same in every figure."""

SAMPLES_PER_PASS = 150
"""Of the memory record, at most; each stands for the highest of many."""

MOST_CLASSES = 30
"""Of a confusion matrix."""

NUMBERED_CLASSES = 12
"""Up to so many, the cells of a confusion matrix have room for numbers."""

FAR = 3.0
"""A budget above this many times the bytes in use is not drawn: the other curves would be flat."""

BUDGET: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 1.2}
"""The line of a budget."""


def draw_losses(epochs: dict[int, list[Epoch]], chance: float | None) -> Plot | None:
    """One panel per stage that has finished an epoch. chance: the loss of a guess, where it is known."""
    trained = {stage: of_stage for stage, of_stage in epochs.items() if of_stage}
    if not trained:
        return None
    columns = min(len(trained), 3)
    rows = math.ceil(len(trained) / columns)
    figure = new_figure(0.7 + 1.35 * rows if rows > 1 else 2.9)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for (stage, of_stage), axes in zip(trained.items(), panels.flat, strict=False):
        numbers = [entry.epoch for entry in of_stage]
        marker = "o" if len(numbers) == 1 else ""
        axes.plot(numbers, [entry.loss for entry in of_stage], color=GRAY, linestyle="--", marker=marker)
        axes.plot(numbers, [entry.held_out_loss for entry in of_stage], color=BLUE, marker=marker)
        best = min(of_stage, key=lambda entry: entry.held_out_loss)
        axes.plot(best.epoch, best.held_out_loss, color=BLUE, marker="o")
        if chance is not None:
            axes.axhline(chance, color=INK, linestyle=":", linewidth=0.9)
        axes.set_title(f"stage {stage}")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(axis="y")
    for axes in panels.flat[len(trained) :]:
        axes.remove()
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    lines = [
        Line2D([], [], color=BLUE, marker="o", label="held-out (dot: best)"),
        Line2D([], [], color=GRAY, linestyle="--", label="training"),
        *([Line2D([], [], color=INK, linestyle=":", linewidth=0.9, label="chance")] if chance is not None else []),
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=3)
    caption = "Loss of each stage after each epoch. The weights of the best held-out epoch are kept."
    return Plot("losses", "Loss", caption, figure)


def draw_probes_in_training(epochs: dict[int, list[Epoch]]) -> Plot | None:
    """A line per stage; None where no epoch was probed."""
    probed = {
        stage: [(entry.epoch, entry.probe_error) for entry in of_stage if entry.probe_error is not None]
        for stage, of_stage in epochs.items()
    }
    if not any(probed.values()):
        return None
    figure = new_figure(2.9)
    axes = figure.subplots()
    colours = (BLUE, ORANGE, GREEN, PINK, OCHRE, GRAY)
    for number, (stage, points) in enumerate((stage, points) for stage, points in probed.items() if points):
        axes.plot(*zip(*points, strict=True), color=colours[number % 6], marker="o", label=f"stage {stage}")
    axes.set(xlabel="epoch", ylabel="error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=6)
    caption = "Error of nearest neighbours while each stage trains, on training samples alone."
    return Plot("probes-in-training", "Error while training", caption, figure)


def draw_memory(memory: dict[int, list[MemorySample]], budget: int | None) -> Plot | None:
    """All stages one behind the other, in the time that they were worked on."""
    memory = {stage: samples for stage, samples in memory.items() if samples}
    if not memory:
        return None
    figure = new_figure(3.1)
    axes = figure.subplots()
    total = sum(samples[-1].seconds for samples in memory.values())
    unit, seconds_per_unit = _time_unit(total)
    begin = 0.0
    for stage, samples in memory.items():
        begin_of_pass = begin
        for caching, of_pass in groupby(samples, key=lambda sample: sample.phase == "caching"):
            thinned = _thinned([(begin + s.seconds, s.live_bytes, s.peak_bytes) for s in of_pass])
            color = ORANGE if caching else BLUE
            # The peak begins anew with a pass, so the line does too.
            times = [time / seconds_per_unit for time in (begin_of_pass, *(sample[0] for sample in thinned))]
            live = [thinned[0][1], *(sample[1] for sample in thinned)]
            peak = [thinned[0][2], *(sample[2] for sample in thinned)]
            axes.fill_between(times, peak, step="pre", color=color, alpha=0.18, linewidth=0)
            axes.step(times, peak, where="pre", color=color)
            axes.fill_between(times, live, step="pre", color=color, alpha=0.55, linewidth=0)
            begin_of_pass = thinned[-1][0]
        middle = begin + samples[-1].seconds / 2
        begin += samples[-1].seconds
        if samples[-1].seconds > 0.04 * total:
            axes.text(middle / seconds_per_unit, 1.01, str(stage), ha="center", transform=axes.get_xaxis_transform())
        axes.axvline(begin / seconds_per_unit, color=INK, linewidth=0.6, alpha=0.3)
    axes.text(0, 1.01, "stage ", ha="right", transform=axes.transAxes)
    highest = max(sample.peak_bytes for samples in memory.values() for sample in samples)
    near = _near(budget, highest)
    if near:
        axes.axhline(near, **BUDGET)
    axes.set(ylim=(0, 1.06 * max(highest, near or 0)), xlim=(0, max(begin, 1e-3) / seconds_per_unit))
    axes.set_xlabel(f"time worked on, {unit}")
    axes.yaxis.set_major_formatter(BYTES)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y")
    keys = [
        Line2D([], [], color=BLUE, label="training: peak"),
        Patch(color=BLUE, alpha=0.55, linewidth=0, label="between steps"),
        Line2D([], [], color=ORANGE, label="caching: peak"),
        Patch(color=ORANGE, alpha=0.55, linewidth=0, label="between pieces"),
        *([Line2D([], [], label="budget", **BUDGET)] if near else []),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=3)
    caption = f"Device memory of each stage; the highest was {size(highest)}{_against(budget, near is not None)}."
    return Plot("memory", "Device memory", caption, figure)


def draw_caches(run: GatheredRun) -> Plot | None:
    """A bar for each cache that is there, and one for all of them."""
    there = [record for record in run.state.stages if record.cache and run.store.cache(record.stage).exists()]
    sizes = {str(record.stage): record.cache_bytes for record in there if record.cache_bytes}
    if not sizes:
        return None
    total = sum(sizes.values())
    disk = run.state.config.cache.disk
    budget = None if disk is None else int(disk)
    figure = new_figure(0.95 + 0.27 * (len(sizes) + 1))
    axes = figure.subplots()
    bars = axes.barh([*sizes, "all"], [*sizes.values(), total], color=[BLUE] * len(sizes) + [GRAY], height=0.65)
    axes.bar_label(bars, [size(count) for count in (*sizes.values(), total)], padding=3, fontsize=8.5)
    near = _near(budget, total)
    axes.set_xlim(0, max(1.2 * total, 1.06 * near if near else 0))
    if near:
        axes.axvline(near, **BUDGET)
        figure.legend(handles=[Line2D([], [], label="disk budget", **BUDGET)], loc="outside upper right")
    axes.invert_yaxis()
    axes.set_ylabel("stage")
    axes.xaxis.set_major_formatter(BYTES)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x")
    missing = [str(record.stage) for record in run.state.stages if str(record.stage) not in sizes]
    gone = f" Stages without a cache now: {', '.join(missing)}." if missing else ""
    caption = f"Caches on the disk now, {size(total)} in all{_against(budget, near is not None)}.{gone}"
    return Plot("caches", "Activation caches", caption, figure)


def draw_probe(probe: ProbeResult) -> Plot:
    """Error of each stage, trained and with random weights."""
    trained = [ModuleError(entry.stage, entry.error, 0.0) for entry in probe.stages]
    untrained = [ModuleError(entry.stage, entry.untrained_error, 0.0) for entry in probe.stages]
    curves: list[_Curve] = [("trained", BLUE, "o", trained), ("random weights", GRAY, "X", untrained)]
    if baseline := probe.baseline:
        level = [ModuleError(entry.stage, baseline.error, 0.0) for entry in probe.stages]
        curves.append((baseline.name, ORANGE, "_", level))
    caption = f"Error of a {probe.classifier} probe on each frozen stage, on test samples; the axis is logarithmic."
    return _draw_errors(f"errors-{probe.label}", f"Error: {probe.label}", caption, curves)


def draw_comparison(comparison: Comparison) -> Plot | None:
    """The figure of the paper: error of each module, a line for each method."""
    label, methods = comparison.label, comparison.methods
    if not methods:
        return None
    curves: list[_Curve] = [(method.method, *STYLES[method.method], method.stages) for method in methods]
    seeds_of_each = [len(method.seeds) for method in methods]
    fewest, most = min(seeds_of_each), max(seeds_of_each)
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    band = f"; line: mean of {seeds} seeds, band: one standard deviation" if most > 1 else ""
    caption = (
        f"Error of a linear probe for {label} on each frozen module, on test samples{band}. The axis is logarithmic."
    )
    return _draw_errors("errors", f"Error per module: {label}", caption, curves)


def draw_costs(methods: Sequence[MethodResult]) -> Plot | None:
    """Device peak, time and disk of each method."""
    kinds: dict[str, list[float]] = {
        "device peak": [method.peak_bytes for method in methods],
        "time": [method.seconds for method in methods],
        "disk": [method.disk_bytes for method in methods],
    }
    kinds = {kind: costs for kind, costs in kinds.items() if any(costs)}
    if not kinds:
        return None
    names = [method.method for method in methods]
    colors = [STYLES[name][0] for name in names]
    unit, seconds_per_unit = _time_unit(max(method.seconds for method in methods))
    figure = new_figure(0.8 + 0.3 * len(methods))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)
    for axes, (kind, costs) in zip(panels.flat, kinds.items(), strict=True):
        values = [cost / seconds_per_unit for cost in costs] if kind == "time" else costs
        bars = axes.barh(names, values, color=colors, height=0.65)
        shown = [f"{value:.3g} {unit}" if kind == "time" else size(round(value)) for value in values]
        axes.bar_label(bars, ["" if not value else text for value, text in zip(values, shown, strict=True)], padding=2)
        axes.set_xlim(0, 2 * max(values))  # room for the numbers
        axes.set_title(kind)
        axes.xaxis.set_major_locator(NullLocator())
        axes.tick_params(left=False)
        axes.spines.bottom.set_visible(False)
    panels[0, 0].invert_yaxis()
    return Plot("costs", "Cost", "What each method took: device peak, time, and disk for caches.", figure)


def draw_sweep(forecasts: Sequence[Forecast]) -> Plot:
    """Memory of each cut over its time."""
    unit, seconds_per_unit = _time_unit(3600 * max(each.hours for each in forecasts))
    figure = new_figure(3.0)
    axes = figure.subplots()
    hours = [3600 * each.hours / seconds_per_unit for each in forecasts]
    for name, color, values in (
        ("peak as laid out", BLUE, [each.peak_bytes for each in forecasts]),
        ("smallest budget", ORANGE, [each.smallest_budget_bytes for each in forecasts]),
    ):
        axes.plot(hours, values, "o", color=color, label=name)
        for each, x, y in zip(forecasts, hours, values, strict=True):
            axes.annotate(str(len(each.stages)), (x, y), xytext=(4, 3), textcoords="offset points")
    axes.set_yscale("log")
    axes.set(xlabel=f"time in {unit} at the full speed of the device", ylabel="device memory, by number of stages")
    axes.yaxis.set_major_formatter(BYTES)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # labels of all nine would lie over one another
    axes.yaxis.set_minor_formatter(BYTES)
    axes.grid(True)
    axes.legend()
    caption = "Device memory and time of cuts into so many stages; one stage is end-to-end training by the same means."
    return Plot("sweep", "Cuts", caption, figure)


def draw_confusion(probe: ProbeResult) -> Plot | None:
    """The classes that the last stage takes for one another; of many classes, those with the most errors."""
    confusion = probe.stages[-1].confusion
    if confusion is None:
        return None
    kept = _worst(confusion)
    classes = [confusion.classes[i] for i in kept]
    shares = [[confusion.counts[i][j] / max(sum(confusion.counts[i]), 1) for j in kept] for i in kept]
    figure = new_figure(4.4)
    axes = figure.subplots()
    # One colour, more or less of it, reads on a light page and on a dark one; at its fullest, text on it still reads.
    cells = axes.pcolormesh(shares, edgecolors="none")
    cells.set_array(None)
    cells.set_facecolor([to_rgba(BLUE, 0.6 * share) for row in shares for share in row])
    if len(kept) <= NUMBERED_CLASSES:
        for row, i in enumerate(kept):
            for column, j in enumerate(kept):
                if count := confusion.counts[i][j]:
                    axes.text(column + 0.5, row + 0.5, str(count), ha="center", va="center", fontsize=7.5)
    ticks = [number + 0.5 for number in range(len(kept))]
    fontsize = 8.5 if len(kept) <= NUMBERED_CLASSES else 6
    axes.set_xticks(ticks, classes, rotation=90 if max(map(len, classes)) > 2 else 0, fontsize=fontsize)
    axes.set_yticks(ticks, classes, fontsize=fontsize)
    axes.tick_params(length=0)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set(xlabel="taken for", ylabel="right")
    fewer = len(kept) < len(confusion.classes)
    few = f" The {len(kept)} classes with the most errors of {len(confusion.classes)}." if fewer else ""
    caption = (
        f"Test samples of each class (rows) and what stage {probe.stages[-1].stage} took them for; the fuller the colour, "
        f"the larger their part of the row.{few}"
    )
    return Plot(f"confusion-{probe.label}", f"Confusion: {probe.label}", caption, figure)


_Curve = tuple[str, str, str, Sequence[ModuleError]]
"""Label, colour, marker, and errors from 0 to 1."""


def _draw_errors(name: str, title: str, caption: str, curves: Sequence[_Curve]) -> Plot:
    means = [error.error_mean for *_, errors in curves for error in errors]
    smallest = min((mean for mean in means if mean > 0), default=0.01)
    zero = min(means) <= 0
    lowest = 0.0 if zero else smallest / 2
    figure = new_figure(3.3)
    axes = figure.subplots()
    for label, color, marker, errors in curves:
        stages = [error.stage for error in errors]
        low, line, high = (
            [max(error.error_mean + side * error.error_std, lowest) for error in errors] for side in (-1, 0, 1)
        )
        axes.fill_between(stages, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(stages, line, color=color, marker=marker, label=label)
    if zero:
        axes.set_yscale("symlog", linthresh=smallest, linscale=0.5)
        axes.set_ylim(bottom=0)
        decades = LogLocator(subs=(1, 2, 5)).tick_values(smallest, axes.get_ylim()[1])
        axes.set_yticks([0, *(tick for tick in decades if smallest <= tick <= axes.get_ylim()[1])])
        caption += f" Below {100 * smallest:.3g} % it is linear, down to 0."
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=_subdivisions(axes)))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_minor_locator(NullLocator())
    modules = sorted({error.stage for *_, errors in curves for error in errors})
    axes.set_xlim(modules[0] - 0.3, modules[-1] + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="module", ylabel="error")
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    return Plot(name, title, caption, figure)


def _subdivisions(axes: Axes) -> Sequence[float]:
    """Of a decade, for the ticks of the logarithmic axis: the narrower its range, the more."""
    low, high = axes.get_ylim()
    if high / low > 12:
        return (1, 2, 5)
    return (1, 1.5, 2, 3, 5, 7) if high / low > 2.5 else (1, 1.2, 1.4, 1.6, 1.8, *(n / 2 for n in range(4, 20)))


def _near(budget: int | None, highest: float) -> int | None:
    """The budget where its line is drawn."""
    return budget if budget is not None and budget <= FAR * highest else None


def _against(budget: int | None, drawn: bool) -> str:
    if budget is None:
        return "; no budget was set"
    return f" of a budget of {size(budget)}{'' if drawn else ', which is far above the figure'}"


def _thinned(samples: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """At most SAMPLES_PER_PASS; of those that lie side by side the last time and the highest bytes."""
    length = math.ceil(len(samples) / SAMPLES_PER_PASS)
    groups = [samples[start : start + length] for start in range(0, len(samples), length)]
    return [(group[-1][0], max(s[1] for s in group), max(s[2] for s in group)) for group in groups]


def _time_unit(seconds: float) -> tuple[str, int]:
    """Name and seconds of the unit in which a time is a small number."""
    return ("h", 3600) if seconds >= 7200 else ("min", 60) if seconds >= 120 else ("s", 1)


def _worst(confusion: Confusion) -> list[int]:
    """Classes, in their order; where they are more than MOST_CLASSES, those with the most errors."""
    numbers = range(len(confusion.classes))
    wrong = [sum(confusion.counts[i]) - confusion.counts[i][i] for i in numbers]
    return sorted(sorted(numbers, key=lambda i: -wrong[i])[:MOST_CLASSES])

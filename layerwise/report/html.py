"""The report: one HTML file that needs nothing else, and its figures as files for papers."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from layerwise.config import Config
from layerwise.files import write_atomically
from layerwise.report.drawing import Plot, inline, styled
from layerwise.report.figures import (
    draw_caches,
    draw_comparison,
    draw_confusion,
    draw_costs,
    draw_losses,
    draw_memory,
    draw_probe,
)
from layerwise.report.records import GatheredComparison, GatheredRun, gather
from layerwise.report.tables import stage_status, totals
from layerwise.units import duration, percent, size


@dataclass(frozen=True, slots=True)
class InlinePlot:
    """A figure on the page."""

    title: str
    caption: str
    drawing: Markup


def write_report(directory: str | Path) -> Path:
    """Writes report.html, and the figures as plots/NAME.svg and .png, into a run directory or that of a comparison.

    Gives the path of the page. The same content of the directory gives the same bytes. Raises RunError where the directory
    is neither of the two, is damaged, or cannot be written.
    """
    directory = Path(directory)
    found = gather(directory)
    with styled():
        page = _run_page(found) if isinstance(found, GatheredRun) else _comparison_page(found)
    path = directory / "report.html"
    write_atomically(path, page.encode())
    return path


def _run_page(run: GatheredRun) -> str:
    plots = list(_published(_run_plots(run), run.store.plots, itertools.count()))
    return _template("run.html.jinja").render(run=run, plots=plots)


def _comparison_page(comparison: GatheredComparison) -> str:
    numbers = itertools.count()
    drawn = [draw_comparison(comparison.label, comparison.methods), draw_costs(comparison.methods)]
    plots = list(_published(drawn, comparison.directory / "plots", numbers))
    runs = [
        (method, run, list(_published(_run_plots(run), run.store.plots, numbers)))
        for method, run in comparison.runs.items()
    ]
    stages = sorted({entry.stage for method in comparison.methods for entry in method.stages})
    return _template("comparison.html.jinja").render(comparison=comparison, stages=stages, plots=plots, runs=runs)


def _run_plots(run: GatheredRun) -> list[Plot | None]:
    return [
        draw_losses(run.epochs, _chance(run.config)),
        draw_memory(run.memory, run.state.budget_bytes),
        *(draw_probe(probe) for probe in run.probes),
        *(draw_confusion(probe) for probe in run.probes),
        draw_caches(run),
    ]


def _chance(config: Config | None) -> float | None:
    """The loss of a guess, in nats, where the objective is InfoNCE."""
    return math.log(1 + config.objective.negatives) if config and config.objective.name == "infonce" else None


def _published(plots: Sequence[Plot | None], folder: Path, numbers: Iterator[int]) -> Iterator[InlinePlot]:
    """Writes the files of each plot into the folder, and gives it for the page."""
    for plot in plots:
        if plot is not None:
            drawing = plot.save("svg")
            write_atomically(folder / f"{plot.name}.svg", drawing)
            write_atomically(folder / f"{plot.name}.png", plot.save("png"))
            yield InlinePlot(plot.title, plot.caption, Markup(inline(drawing, next(numbers))))


def _template(name: str) -> Template:
    # Everything that is put in is escaped, the drawings alone excepted, whose text matplotlib has escaped.
    environment = Environment(
        loader=PackageLoader("layerwise.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"size": size, "duration": duration, "percent": percent}
    environment.globals |= {"stage_status": stage_status, "totals": totals}
    return environment.get_template(name)

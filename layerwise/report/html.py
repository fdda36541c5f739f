"""The report: one HTML file that needs nothing else, and its figures as files for papers."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from layerwise.evaluate.results import COMPARISON, load_comparison
from layerwise.files import write_atomically
from layerwise.forecast import END_TO_END, is_end_to_end
from layerwise.report.drawing import Plot, inline, styled
from layerwise.report.figures import (
    draw_caches,
    draw_comparison,
    draw_confusion,
    draw_costs,
    draw_losses,
    draw_memory,
    draw_probe,
    draw_probes_in_training,
)
from layerwise.report.records import GatheredRun, first_runs, gather_run
from layerwise.report.tables import headline, stage_status, totals
from layerwise.units import duration, percent, size


def write_report(directory: str | Path) -> Path:
    """Writes report.html, and the figures as plots/NAME.svg and .png, into a run directory or that of a comparison.

    Gives the path of the page. The same content of the directory gives the same bytes. Raises RunError where the directory
    is neither of the two, is damaged, or cannot be written.
    """
    directory = Path(directory)
    with styled():
        page = _comparison_page(directory) if (directory / COMPARISON).exists() else _run_page(directory)
    path = directory / "report.html"
    write_atomically(path, page.encode())
    return path


def _run_page(directory: Path) -> str:
    run = gather_run(directory)
    plots = _published(_run_plots(run), run.store.plots, itertools.count())
    return _template("run.html.jinja").render(run=run, plots=plots, results=headline(run.state, run.probes))


def _comparison_page(directory: Path) -> str:
    comparison, numbers = load_comparison(directory), itertools.count()
    drawn = [draw_comparison(comparison), draw_costs(comparison.methods)]
    plots = _published(drawn, directory / "plots", numbers)
    runs = [
        (method, run, _published(_run_plots(run), run.store.plots, numbers))
        for method, run in first_runs(directory, comparison).items()
    ]
    return _template("comparison.html.jinja").render(comparison=comparison, directory=directory, plots=plots, runs=runs)


def _run_plots(run: GatheredRun) -> list[Plot | None]:
    return [
        *(draw_probe(probe) for probe in run.probes),
        draw_memory(run.memory, run.state.budget_bytes),
        draw_losses(run.epochs, run.state.config.objective.chance_loss),
        draw_probes_in_training(run.epochs),
        *(draw_confusion(probe) for probe in run.probes),
        draw_caches(run),
    ]


def _published(plots: Sequence[Plot | None], folder: Path, numbers: Iterator[int]) -> list[tuple[Plot, Markup]]:
    """Writes the files of each plot into the folder, and gives its drawing for the page."""
    published = []
    for plot in filter(None, plots):
        drawing = plot.save("svg")
        write_atomically(folder / f"{plot.name}.svg", drawing)
        write_atomically(folder / f"{plot.name}.png", plot.save("png"))
        published.append((plot, Markup(inline(drawing, next(numbers)))))
    return published


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
    environment.globals |= {
        "stage_status": stage_status,
        "totals": totals,
        "is_end_to_end": is_end_to_end,
        "end_to_end": END_TO_END,
    }
    return environment.get_template(name)

"""`layerwise probe` and `layerwise compare`: classifiers on frozen stages, of one run or of the methods of the paper."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from layerwise.commands.options import (
    ConfiguredCommand,
    configured,
    data_option,
    directory_argument,
    json_option,
    network_option,
)
from layerwise.config import Config
from layerwise.errors import ConfigError
from layerwise.evaluate.results import EQUALLY_LONG
from layerwise.events import EpochDone, Event
from layerwise.report.printing import answer_json, measuring, remark, say, working
from layerwise.report.tables import comparison_table, few_test_samples, no_better, probe_table
from layerwise.run_store import ProbeResult
from layerwise.stop import stop_in_time, stop_on_signals
from layerwise.units import size


@click.command(short_help="Test a label on every frozen stage.")
@directory_argument
@click.option(
    "--label",
    "names",
    required=True,
    multiple=True,
    help="What to tell apart: speaker, phone, digit, class, or a label of your own; may be given several times.",
)
@click.option(
    "--classifier", default="linear", metavar="NAME", help="linear, or knn: nearest neighbours. [default: linear]"
)
@click.option(
    "--grid",
    type=click.IntRange(1, 64),
    help="Features are means over so many cells a side of a picture. [default: 2; of recordings 1]",
)
@network_option
@data_option
@click.option("--labels", help="CSV file of labels, as run takes it; default: that of the run.")
@json_option
def probe(
    directory: Path, names: tuple[str, ...], classifier: str, grid: int | None, as_json: bool, **of_run: Any
) -> None:
    """Fit a classifier for a label on every frozen stage of the run in DIR.

    Prints the error on the test samples, beside that of the same network with random weights. With several labels there is a
    table for each; --json then prints a list.
    """
    from layerwise.evaluate.probe import open_to_probe, probe_label  # imports torch, which --help need not wait for

    results, labels, opened = [], list(dict.fromkeys(names)), None
    try:
        with stop_on_signals() as stop:
            for label in labels:
                with measuring(f"probing {label}") as show:
                    opened = opened or open_to_probe(directory, notify=show, **of_run)
                    results.append(probe_label(opened, label, classifier, grid, stop, show))
                if not as_json:
                    _tell(results[-1])
    finally:  # what is known is told, whatever became of the next label
        if as_json and results:
            answer_json(results if len(labels) > 1 else results[0])


def _tell(result: ProbeResult) -> None:
    say(probe_table(result), f"device peak {size(result.peak_bytes)}")
    for warning in filter(None, (no_better(result), few_test_samples(result))):
        say(warning)


@click.command(cls=ConfiguredCommand, short_help="Compare the methods of the paper on one data set.")
@partial(configured, default_out="runs/compare-{recipe}")
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(1), help="Runs of each method, from --seed on."
)
@click.option("--methods", metavar="A,B,...", help="Which of them. [default: all but those to convergence]")
@json_option
def compare(config: Config, seeds: int, methods: str | None, as_json: bool) -> None:
    """Train Greedy InfoMax stage by stage and all at once, CPC end to end, and their supervised twins; probe every module.

    Each module of each method is trained for --max-epochs epochs; cpc-converged and supervised-converged, which are named in
    --methods, until the held-out loss stops falling. --label names what the probes tell apart. The objective is that of the
    run: with NT-Xent, "cpc" is NT-Xent end to end. The same command goes on with a comparison that was stopped.
    """
    if not config.objective.label:
        raise ConfigError("compare needs --label NAME: what the probes tell apart.")

    from layerwise.evaluate.compare import compare as compare_library  # imports torch, which --help need not wait for

    first = config.training.seed
    doing = ""

    def show(event: Event) -> None:
        if isinstance(event, EpochDone):
            spin(f"{doing}: stage {event.stage}, epoch {event.epoch}")

    def tell(line: str) -> None:
        nonlocal doing
        doing = line
        remark(line)

    with stop_on_signals() as stop, stop_in_time(stop, config.engine.time), working("comparing") as spin:
        chosen = EQUALLY_LONG if methods is None else tuple(name.strip() for name in methods.split(","))
        found = compare_library(
            config,
            config.objective.label,
            seeds=range(first, first + seeds),
            methods=chosen,
            stop=stop,
            notify=show,
            tell=tell,
        )
    if as_json:
        answer_json({"label": found.label, "methods": found.methods})
        return
    say(f"test error of a linear probe for {found.label} after each module, {found.epochs} epochs a module")
    say(comparison_table(found))
    say(f"kept in {config.out}/compare.json")

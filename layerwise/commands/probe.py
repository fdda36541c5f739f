"""`layerwise probe`: classifiers on the frozen stages of a run."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
from rich.console import Console

from layerwise.commands.options import data_option, directory_argument, json_option, network_option
from layerwise.report.tables import console_for_results, few_test_samples, probe_table
from layerwise.stop import stop_on_signals
from layerwise.units import size


@click.command(short_help="Test a label on every frozen stage.")
@directory_argument
@click.option(
    "--label", required=True, help="What to tell apart: speaker, phone, digit, class, or a label of your own."
)
@click.option(
    "--classifier", default="linear", metavar="NAME", help="linear, or knn: nearest neighbours. [default: linear]"
)
@network_option
@data_option
@json_option
def probe(directory: Path, label: str, classifier: str, net: str | None, data: str | None, as_json: bool) -> None:
    """Fit a classifier for a label on every frozen stage of the run in DIR.

    Prints the error on the test samples, beside that of the same network with random weights.
    """
    from layerwise.evaluate.probe import probe as probe_library  # imports torch, which --help need not wait for

    console = Console(stderr=True)
    with stop_on_signals() as stop, console.status("probing", spinner="dots") as shown:
        result = probe_library(
            directory,
            label,
            classifier=classifier,
            network=net,
            data=data,
            stop=stop,
            notify=lambda line: shown.update(f"probing: {line}"),
            warn=partial(console.print, highlight=False, markup=False, soft_wrap=True),
        )
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return
    console_for_results().print(probe_table(result))
    click.echo(f"device peak {size(result.peak_bytes)}")
    if warning := few_test_samples(result):
        click.echo(warning)

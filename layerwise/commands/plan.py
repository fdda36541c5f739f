"""`layerwise plan`: what a run would take, with nothing run."""

import json
from dataclasses import asdict

import click
from rich.console import Console

from layerwise.commands.options import configured, json_option
from layerwise.config import Config
from layerwise.report.tables import console_for_results, forecast_lines, forecast_table


@click.command(short_help="Predict what a run would take; runs nothing.")
@configured
@json_option
def plan(config: Config, as_json: bool) -> None:
    """Predict, for each stage, what it takes on the device, on the disk and on the host, and whether --gpu-mem holds it.

    Takes the options of `run`. Nothing is trained and nothing is written.
    """
    from layerwise.engines.plan import plan as plan_library  # imports torch, which --help need not wait for

    with Console(stderr=True).status("rehearsing", spinner="dots"):
        forecast = plan_library(config)
    if as_json:
        click.echo(json.dumps(asdict(forecast)))
        return
    console_for_results().print(forecast_table(forecast))
    click.echo("\n".join(forecast_lines(forecast)))

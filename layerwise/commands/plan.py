"""`layerwise plan`: what a run would take, with nothing run."""

import json
from dataclasses import asdict

import click

from layerwise.commands.options import configured, json_option
from layerwise.config import Config
from layerwise.report.printing import answer, answer_exactly, working
from layerwise.report.tables import forecast_lines, forecast_table


@click.command(short_help="Predict what a run would take; runs nothing.")
@configured
@json_option
def plan(config: Config, as_json: bool) -> None:
    """Predict, for each stage, what it takes on the device, on the disk and on the host, and whether --gpu-mem holds it.

    Takes the options of `run`. Nothing is trained and nothing is written.
    """
    from layerwise.engines.plan import plan as plan_library  # imports torch, which --help need not wait for

    with working("rehearsing"):
        forecast = plan_library(config)
    if as_json:
        answer_exactly(json.dumps(asdict(forecast)))
        return
    answer(forecast_table(forecast), *forecast_lines(forecast))

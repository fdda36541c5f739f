"""`layerwise compare`: the methods of the paper side by side."""

import json
from dataclasses import asdict
from functools import partial

import click
from rich.console import Console

from layerwise.commands.options import configured, json_option
from layerwise.config import Config
from layerwise.errors import ConfigError
from layerwise.evaluate.results import METHODS
from layerwise.events import EpochDone, Event
from layerwise.report.tables import comparison_table, console_for_results
from layerwise.stop import stop_in_time, stop_on_signals


@click.command(short_help="Compare the methods of the paper on one data set.")
@partial(configured, default_out="runs/compare-{recipe}")
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(1), help="Runs of each method, from --seed on."
)
@click.option("--methods", metavar="A,B,...", help="Some of them only. [default: all]")
@json_option
def compare(config: Config, seeds: int, methods: str | None, as_json: bool) -> None:
    """Train Greedy InfoMax stage by stage and all at once, CPC end to end, and their supervised twins; probe every module.

    Each module of each method is trained for --max-epochs epochs; --label names what the probes tell apart. The same command
    goes on with a comparison that was stopped.
    """
    if not config.objective.label:
        raise ConfigError("compare needs --label NAME: what the probes tell apart.")

    from layerwise.evaluate.compare import compare as compare_library  # imports torch, which --help need not wait for

    first = config.training.seed
    console, doing = Console(stderr=True), ""

    def show(event: Event) -> None:
        if isinstance(event, EpochDone):
            shown.update(f"{doing}: stage {event.stage}, epoch {event.epoch}")

    def tell(line: str) -> None:
        nonlocal doing
        doing = line
        console.print(line, highlight=False, markup=False)

    with (
        stop_on_signals() as stop,
        stop_in_time(stop, config.engine.time),
        console.status("comparing", spinner="dots") as shown,
    ):
        chosen = tuple(METHODS) if methods is None else tuple(name.strip() for name in methods.split(","))
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
        click.echo(json.dumps({"label": found.label, "methods": [asdict(method) for method in found.methods]}))
        return
    console = console_for_results()
    console.print(f"test error of a linear probe for {found.label} after each module, {found.epochs} epochs a module")
    console.print(comparison_table(found))
    click.echo(f"kept in {config.out}/compare.json")

"""`layerwise compare`: the methods of the paper side by side."""

import json
from dataclasses import asdict
from functools import partial

import click

from layerwise.commands.options import configured, json_option
from layerwise.config import Config
from layerwise.errors import ConfigError
from layerwise.evaluate.results import METHODS
from layerwise.events import EpochDone, Event
from layerwise.report.printing import answer_exactly, remark, say, working
from layerwise.report.tables import comparison_table
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
    doing = ""

    def show(event: Event) -> None:
        if isinstance(event, EpochDone):
            spin(f"{doing}: stage {event.stage}, epoch {event.epoch}")

    def tell(line: str) -> None:
        nonlocal doing
        doing = line
        remark(line)

    with stop_on_signals() as stop, stop_in_time(stop, config.engine.time), working("comparing") as spin:
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
        answer_exactly(json.dumps({"label": found.label, "methods": [asdict(method) for method in found.methods]}))
        return
    say(f"test error of a linear probe for {found.label} after each module, {found.epochs} epochs a module")
    say(comparison_table(found))
    say(f"kept in {config.out}/compare.json")

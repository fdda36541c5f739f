"""`layerwise run`: start a run, or go on with it."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import click
from rich.console import Console

from layerwise.commands.options import configured
from layerwise.config import Config
from layerwise.errors import LayerwiseError, ToldElsewhere
from layerwise.events import Notify, silent
from layerwise.report.lines import LogFile, PlainLines
from layerwise.report.live import LiveTable
from layerwise.report.summary import (
    console_for_results,
    stage_table,
    stages_at_chance,
    totals,
    what_next,
    where_things_lie,
)
from layerwise.run_directory import RunPaths
from layerwise.stop import stop_on_signals

if TYPE_CHECKING:
    from layerwise.engines.run import RunResult


@click.command(short_help="Train every stage that is not done yet.")
@configured
@click.option("--from-stage", type=int, help="Retrain this stage and those above it from the cache of the stage below.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out first.")
def run(config: Config, from_stage: int | None, overwrite: bool) -> None:
    """Train every stage that is not done yet, each from the activation cache of the one below.

    The same command starts a run and goes on with it. With no --data it trains the demo.
    """
    paths = RunPaths.of(config.out, config.cache.dir)
    log = LogFile(paths.log)

    from layerwise.engines.joining import is_restart, joined
    from layerwise.engines.run import run as run_library  # imports torch, which --help need not wait for

    console = console_for_results()
    with joined(config) as ranks, stop_on_signals() as stop:
        try:
            with _display(console) if ranks.first else nullcontext(silent) as show:
                result = run_library(
                    config,
                    from_stage=from_stage,
                    overwrite=overwrite and not is_restart(),
                    stop=stop,
                    notify=lambda event: (show(event), log(event)),
                    ranks=ranks,
                )
        except ToldElsewhere:
            raise
        except LayerwiseError as error:
            log.write(str(error))
            raise
    if ranks.first:
        _print_summary(console, result)


def _display(console: Console) -> AbstractContextManager[Notify]:
    """The live table on a terminal, plain lines elsewhere."""
    return LiveTable(console) if console.is_terminal else nullcontext(PlainLines(sys.stdout))


def _print_summary(console: Console, result: "RunResult") -> None:
    console.print()
    console.print(stage_table(result.state))
    warning = stages_at_chance(result.state, result.config.objective)
    for line in (
        f"\ndone: {totals(result.state)}",
        *([warning] if warning else []),
        *where_things_lie(result.paths),
        "next:",
        *(f"  {command}" for command in what_next(result.paths, list(result.labels))),
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)

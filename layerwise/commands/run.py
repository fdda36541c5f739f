"""`layerwise run`: start a run, or go on with it."""

import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING

import click
from rich.console import Console

from layerwise.commands.options import configured
from layerwise.config import Config
from layerwise.engines.requeue import queue_again
from layerwise.errors import ConfigError, Interrupted, LayerwiseError, ToldElsewhere
from layerwise.events import Event, Notify, silent
from layerwise.report.progress import LiveTable, LogFile, PlainLines
from layerwise.report.tables import (
    console_for_results,
    stage_table,
    stages_at_chance,
    totals,
    what_next,
    where_things_lie,
)
from layerwise.run_store import RunStore
from layerwise.stop import stop_in_time, stop_on_signals

if TYPE_CHECKING:
    from layerwise.engines.run import RunResult


@click.command(short_help="Train every stage that is not done yet.")
@configured
@click.option("--from-stage", type=int, help="Retrain this stage and those above it from the cache of the stage below.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out first.")
@click.option("--dry-run", is_flag=True, help="With --engine slurm: print the batch scripts, and do nothing.")
def run(config: Config, from_stage: int | None, overwrite: bool, dry_run: bool) -> None:
    """Train every stage that is not done yet, each from the activation cache of the one below.

    The same command starts a run and goes on with it. With no --data it trains the demo.
    """
    if config.engine.name == "slurm":
        _hand_in(config, from_stage, overwrite, dry_run)
        return
    if dry_run:
        raise ConfigError("--dry-run prints batch scripts: give --engine slurm, too. For a forecast: layerwise plan.")
    store = RunStore.of(config.out, config.cache.dir)
    log = LogFile(store.log)

    console = console_for_results()
    with stop_on_signals() as stop, stop_in_time(stop, config.engine.time), ExitStack() as sharing:
        # These import torch, which --help need not wait for, and a signal may well come meanwhile.
        from layerwise.engines.run import run as run_library
        from layerwise.engines.torchrun import is_restart, join_ranks

        ranks = sharing.enter_context(join_ranks(config))
        try:
            with _display(console) if ranks.first else nullcontext(silent) as show:

                def tell(event: Event) -> None:
                    show(event)
                    log(event)

                result = run_library(
                    config,
                    from_stage=from_stage,
                    overwrite=overwrite and not is_restart(),
                    stop=stop,
                    notify=tell,
                    ranks=ranks,
                )
        except ToldElsewhere:
            raise
        except LayerwiseError as error:
            log.write(str(error))
            if isinstance(error, Interrupted):
                _queue_again(stop.reason, store, log)
            raise
    if ranks.first:
        _print_summary(console, result)


def _hand_in(config: Config, from_stage: int | None, overwrite: bool, dry_run: bool) -> None:
    """The run as batch jobs of Slurm."""
    from layerwise.engines.slurm import scripts, submit_run

    if dry_run:
        for task, text in scripts(config, from_stage=from_stage, overwrite=overwrite):
            needs = ", ".join(f"round {need.round} stage {need.stage}" for need in task.needs)
            click.echo(f"# round {task.round}, stage {task.stage}; after {needs or 'nothing'}\n{text}")
        return
    with stop_on_signals() as stop:
        jobs = submit_run(config, from_stage=from_stage, overwrite=overwrite, stop=stop, notify=PlainLines(sys.stdout))
    for job in jobs:
        click.echo(f"job {job.number}: round {job.task.round}, stage {job.task.stage}; log {job.log}")
    out = RunStore.of(config.out, config.cache.dir).out
    click.echo(f"next:\n  layerwise status {out} --watch" if jobs else f"done before: {out}")


def _queue_again(stopped_by: str | None, store: RunStore, log: LogFile) -> None:
    """As a batch job: has Slurm start the job again. Raises RunError where that would go on for ever."""

    def say(line: str) -> None:
        click.echo(line, err=True)
        log.write(line)

    try:
        queue_again(stopped_by, store, say)
    except LayerwiseError as error:
        log.write(str(error))
        raise


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
        *where_things_lie(result.paths, result.state),
        "next:",
        *(f"  {command}" for command in what_next(result.paths, list(result.labels))),
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)

"""`layerwise run`: start a run, or go on with it. `layerwise task`: one task of a prepared run, for batch jobs."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerwise import config as configuration
from layerwise.commands.options import ConfiguredCommand, configured, data_option, directory_argument, network_option
from layerwise.config import Config
from layerwise.engines.requeue import queue_again
from layerwise.errors import ConfigError, Interrupted, LayerwiseError, ToldElsewhere
from layerwise.events import broadcast, silent
from layerwise.report.printing import answer_exactly, console_for_results, remark, say
from layerwise.report.progress import LogFile, PlainLines, display
from layerwise.report.tables import (
    more_epochs,
    stage_table,
    stages_at_chance,
    totals,
    what_next,
    where_things_lie,
)
from layerwise.run_store import RunStore, open_run, own_options
from layerwise.stop import StopFlag, stop_in_time, stop_on_signals, too_late_to_stop

if TYPE_CHECKING:
    from layerwise.engines.run import RunResult


def _own_or_resolved(recipe: str | None, file: Path | None, given: dict[str, Any], default_out: str) -> Config:
    overwrite = click.get_current_context().params["overwrite"]
    own = own_options(given) if recipe is None and file is None and not overwrite else None
    if own is None and recipe is None and file is None and set(given) == {"out"}:  # it may be meant to go on with a run
        remark(f"there is no run in {given['out']} to go on with: the demo begins there; for others name --data")
    return own or configuration.resolve(recipe, file, given, default_out)


@click.command(cls=ConfiguredCommand, short_help="Train every stage that is not done yet.")
@partial(configured, resolve=_own_or_resolved)
@click.option(
    "--from-stage",
    type=int,
    help="Retrain this stage and those above it from the cache of the stage below; train them further where --max-epochs is "
    "larger now and nothing else has changed.",
)
@click.option("--overwrite", is_flag=True, help="Delete the run in --out first.")
@click.option("--dry-run", is_flag=True, help="With --engine slurm: print the batch scripts, and do nothing.")
def run(config: Config, from_stage: int | None, overwrite: bool, dry_run: bool) -> None:
    """Train every stage that is not done yet, each from the activation cache of the one below.

    The same command starts a run and goes on with it, and so does --out DIR alone, by the run's own options. With no --data it
    trains the demo.
    """
    if config.engine.name == "slurm":
        _submit(config, from_stage, overwrite, dry_run)
        return
    if dry_run:
        raise ConfigError("--dry-run prints batch scripts: give --engine slurm, too. For a forecast: layerwise plan.")
    store = RunStore.of(config.out, config.cache.dir)
    log = LogFile(store.log)
    with stop_on_signals() as stop, stop_in_time(stop, config.engine.time), ExitStack() as sharing:
        # These import torch, which --help need not wait for, and a signal may well come meanwhile.
        from layerwise.engines.run import run as run_library
        from layerwise.engines.torchrun import is_restart, join_ranks

        ranks = sharing.enter_context(join_ranks(config))
        with (
            _logging_errors(log, stop, store),
            display(console_for_results()) if ranks.first else nullcontext(silent) as show,
        ):
            result = run_library(
                config,
                from_stage=from_stage,
                overwrite=overwrite and not is_restart(),
                stop=stop,
                notify=broadcast(show, log),
                ranks=ranks,
            )
    if ranks.first:
        _print_summary(result)


@click.command(short_help="Perform one task of a run that is prepared.", hidden=True)
@directory_argument
@click.option("--round", "round", type=int, required=True, help="Round, from 1.")
@click.option("--stage", type=int, required=True, help="Stage, from 1.")
@network_option
@data_option
def task(directory: Path, round: int, stage: int, network: str | None, data: str | None) -> None:
    """Train and cache one stage in one round of the run in DIR, whose needs are done; the last task writes the encoder."""
    store, state = open_run(directory)
    with stop_on_signals() as stop:
        # A signal may well come while torch is imported, too.
        from layerwise.engines.task_runner import open_prepared_run, perform_task, write_encoder
        from layerwise.training.schedule import Task

        run = open_prepared_run(directory, {"net.name": network, "data.source": data})
        rounds = run.config.training.rounds
        if not (1 <= round <= rounds and 1 <= stage <= len(state.stages)):
            raise ConfigError(
                f"--round {round} --stage {stage}: {directory} has {rounds} rounds of {len(state.stages)} stages."
            )
        log = LogFile(store.log)
        with stop_in_time(stop, run.config.engine.time), _logging_errors(log, stop, store.round(round, rounds)):
            perform_task(Task(round, stage), run, stop, broadcast(PlainLines(sys.stdout), log))
        if (round, stage) == (rounds, len(state.stages)):
            write_encoder(run)
    too_late_to_stop()


@contextmanager
def _logging_errors(log: LogFile, stop: StopFlag, store: RunStore) -> Iterator[None]:
    """Writes errors to the log too. Where the stop is the cluster's, has Slurm start the batch job again.

    Raises RunError in place of Interrupted where the job would be started again for ever.
    """

    def say(line: str) -> None:
        remark(line)
        log.write(line)

    try:
        yield
    except ToldElsewhere:
        raise
    except LayerwiseError as error:
        log.write(str(error))
        if isinstance(error, Interrupted):
            try:
                queue_again(stop.reason, store, say)
            except LayerwiseError as endless:
                log.write(str(endless))
                raise
        raise


def _submit(config: Config, from_stage: int | None, overwrite: bool, dry_run: bool) -> None:
    """The run as batch jobs of Slurm."""
    from layerwise.engines.slurm import scripts, submit_run
    from layerwise.training.resume import StartRequest

    request = StartRequest(from_stage, overwrite)
    if dry_run:
        for task, text in scripts(config, request):
            needs = ", ".join(f"round {need.round} stage {need.stage}" for need in task.needs)
            answer_exactly(f"# round {task.round}, stage {task.stage}; after {needs or 'nothing'}\n{text}")
        return
    with stop_on_signals() as stop:
        jobs = submit_run(config, request, stop, PlainLines(sys.stdout))
    for job in jobs:
        say(f"job {job.number}: round {job.task.round}, stage {job.task.stage}; log {job.log}")
    out = RunStore.of(config.out, config.cache.dir).out
    say(*(["next:", f"  layerwise status {out} --watch"] if jobs else [f"done before: {out}"]))


def _print_summary(result: "RunResult") -> None:
    warning = stages_at_chance(result.state, result.config.objective)
    say(
        "",
        stage_table(result.state, result.paths),
        "",
        f"done: {totals(result.state)}",
        *([warning] if warning else []),
        *where_things_lie(result.paths, result.state),
        "next:",
        *(f"  {command}" for command in what_next(result.paths, result.labels, result.config)),
        *more_epochs(result.paths, result.state),
    )

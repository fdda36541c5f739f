"""`layerwise task`: one task of a run that is prepared; what batch jobs run."""

import sys
from pathlib import Path

import click

from layerwise.engines.requeue import queue_again
from layerwise.errors import ConfigError, Interrupted, LayerwiseError
from layerwise.events import Event
from layerwise.report.progress import LogFile, PlainLines
from layerwise.run_store import open_run
from layerwise.stop import stop_in_time, stop_on_signals, too_late_to_stop


@click.command(short_help="Perform one task of a run that is prepared.", hidden=True)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--round", "round", type=int, required=True, help="Round, from 1.")
@click.option("--stage", type=int, required=True, help="Stage, from 1.")
def task(directory: Path, round: int, stage: int) -> None:
    """Train and cache one stage in one round of the run in DIR, whose needs are done; the last task writes the encoder."""
    store, state = open_run(directory)
    with stop_on_signals() as stop:
        # A signal may well come while torch is imported, too.
        from layerwise.engines.task_runner import open_prepared_run, perform_task, write_encoder
        from layerwise.training.schedule import Task

        run = open_prepared_run(directory)
        rounds = run.config.training.rounds
        if not (1 <= round <= rounds and 1 <= stage <= len(state.stages)):
            raise ConfigError(
                f"--round {round} --stage {stage}: {directory} has {rounds} rounds of {len(state.stages)} stages."
            )
        show, log = PlainLines(sys.stdout), LogFile(store.log)

        def tell(event: Event) -> None:
            show(event)
            log(event)

        with stop_in_time(stop, run.config.engine.time):
            try:
                perform_task(Task(round, stage), run, stop, tell)
            except Interrupted as interrupted:
                log.write(str(interrupted))
                queue_again(stop.reason, store.round(round, rounds), lambda line: _say(line, log))
                raise
            except LayerwiseError as error:
                log.write(str(error))
                raise
        if (round, stage) == (rounds, len(state.stages)):
            write_encoder(run)
    too_late_to_stop()


def _say(line: str, log: LogFile) -> None:
    click.echo(line, err=True)
    log.write(line)

"""`layerwise status`: what each stage of a run is at."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from layerwise.files import is_locked
from layerwise.report.summary import console_for_results, stage_table, totals
from layerwise.run_directory import open_run


@click.command(short_help="Show what each stage is at.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for scripts.")
def status(directory: Path, as_json: bool) -> None:
    """Show each stage of the run in DIR."""
    paths, state = open_run(directory)
    overall = "done" if state.done else "running" if is_locked(paths.lock) else "stopped"
    if as_json:
        stages = [asdict(record) for record in state.stages]
        click.echo(
            json.dumps({"state": overall, "budget_bytes": state.budget_bytes, "device": state.device, "stages": stages})
        )
        return
    console = console_for_results()
    console.print(stage_table(state))
    console.print(f"{overall}: {totals(state)}", highlight=False)

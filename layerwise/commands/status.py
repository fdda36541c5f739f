"""`layerwise status` and `layerwise report`: what each stage of a run is at, in the terminal and as a page."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Group
from rich.live import Live

from layerwise.commands.options import directory_argument, json_option
from layerwise.errors import RunError
from layerwise.evaluate.results import COMPARISON
from layerwise.report.printing import answer, answer_json, console_for_results, say
from layerwise.report.records import progress, round_states
from layerwise.report.tables import rounds_table, stage_table, totals
from layerwise.run_store import RunState, RunStore, StageRecord, open_run
from layerwise.screen import refuse_loss
from layerwise.stop import stop_on_signals

WATCH_SECONDS = 1.0


@click.command(short_help="Show what each stage is at.")
@directory_argument
@json_option
@click.option("--watch", is_flag=True, help="Look again every second, until the run is done or Ctrl-C.")
def status(directory: Path, as_json: bool, watch: bool) -> None:
    """Show each stage of the run in DIR: with --rounds, who trains it, which version it has published, how far it is behind."""
    if (directory / COMPARISON).exists():
        raise RunError(
            f"{directory} is a comparison; see it with: layerwise report {directory}. Its runs lie in {directory}/runs."
        )
    store, state = open_run(directory)
    if as_json:
        answer_json(_as_json(store, state))
        return
    if not watch:
        answer(_shown(store, state))
        return
    with stop_on_signals() as stop, Live(console=console_for_results(), auto_refresh=False) as live:
        while not stop.reason:
            live.update(_shown(store, state), refresh=True)
            refuse_loss(live.console.file)
            if state.done:
                break
            time.sleep(WATCH_SECONDS)
            state = store.load_state()


def _shown(store: RunStore, state: RunState) -> Group:
    states = round_states(store, state)
    table = (
        rounds_table(states, state.config.training.rounds) if states and not state.done else stage_table(state, store)
    )
    return Group(table, f"{progress(store, state, states)}: {totals(state)}")


def _as_json(store: RunStore, state: RunState) -> dict[str, object]:
    """The contract's object; `rounds` in it is for runs that have several."""
    states, rounds = round_states(store, state), state.config.training.rounds
    tree: dict[str, object] = {
        "state": progress(store, state, states),
        "budget_bytes": state.budget_bytes,
        "device": state.device,
        "stages": _stages(store, state.stages),
    }
    if states:
        tree["rounds"] = [
            {
                "round": each.number,
                "worker": each.worker,
                "stages": _stages(store.round(each.number, rounds), each.stages),
            }
            for each in states
        ]
    return tree


def _stages(store: RunStore, records: Sequence[StageRecord]) -> list[dict[str, Any]]:
    return [record.as_json(store.cache(record.stage)) for record in records]


@click.command(short_help="Write one page with tables and figures.")
@directory_argument
def report(directory: Path) -> None:
    """Write DIR/report.html, which shows the run or the comparison in DIR and needs no network.

    Its figures also lie in DIR/plots, as .svg and .png.
    """
    from layerwise.report.html import write_report  # imports matplotlib, which --help need not wait for

    say(f"{write_report(directory)} (figures: {directory / 'plots'})")

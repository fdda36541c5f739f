"""`layerwise plan`: what a run would take, with nothing run."""

from pathlib import Path

import click

from layerwise.commands.options import configured, json_option
from layerwise.config import Config
from layerwise.errors import ConfigError
from layerwise.files import write_atomically
from layerwise.report.printing import answer, answer_json, remark, working
from layerwise.report.tables import TIMES_OF_A_SWEEP, cheapest_cut, forecast_lines, forecast_table, sweep_table


@click.command(short_help="Predict what a run would take; runs nothing.")
@configured
@click.option("--sweep", "sweeps", is_flag=True, help="Compare cuts, from one stage (end to end) to the finest.")
@click.option("--plot", type=click.Path(path_type=Path), help="With --sweep: draw it into this .svg or .png file.")
@json_option
def plan(config: Config, sweeps: bool, plot: Path | None, as_json: bool) -> None:
    """Predict, for each stage, what it takes on the device, on the disk and on the host, and whether --gpu-mem holds it.

    Takes the options of `run`. Nothing is trained and nothing is written. With --sweep there is a row for each of several cuts,
    one stage is end-to-end training by the same means, and --stages is not needed.
    """
    if plot is not None and (not sweeps or plot.suffix not in (".svg", ".png")):
        raise ConfigError(f"--plot {plot}: give it with --sweep, and a name that ends in .svg or .png.")
    from layerwise.engines.plan import plan as plan_library  # imports torch, which --help need not wait for
    from layerwise.engines.plan import sweep

    if not sweeps:
        with working("rehearsing"):
            forecast = plan_library(config)
        if as_json:
            answer_json(forecast)
        else:
            answer(forecast_table(forecast), *forecast_lines(forecast))
        return
    with working("rehearsing"):
        forecasts = sweep(config)
    if plot is not None:
        from layerwise.report.drawing import styled
        from layerwise.report.figures import draw_sweep

        with styled():
            write_atomically(plot, draw_sweep(forecasts).save("svg" if plot.suffix == ".svg" else "png"))
        remark(f"{plot}: drawn")
    if as_json:
        answer_json(forecasts)
    else:
        answer(sweep_table(forecasts), TIMES_OF_A_SWEEP, cheapest_cut(forecasts))

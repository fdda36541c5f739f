"""`layerwise doctor`, `recipes`, `init` and `plan`: what comes before a run."""

import os
import shlex
from pathlib import Path

import click

from layerwise.commands.options import ConfiguredCommand, configured, json_option
from layerwise.config import Config, commented, function_flags, recipe_names, recipe_text
from layerwise.doctor import Finding
from layerwise.doctor.examine import examine
from layerwise.errors import ConfigError, RunError, SetupError
from layerwise.files import write_atomically
from layerwise.forecast import END_TO_END
from layerwise.report.printing import answer, answer_exactly, answer_json, remark, say, working
from layerwise.report.tables import TIMES_OF_A_SWEEP, cheapest_cut, forecast_lines, forecast_table, sweep_table


@click.command(short_help="Examine the installation and the machine.")
@click.option(
    "--cache-dir",
    default="cache",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of the activation caches, whose disk is tried with a file of 256 MB.",
)
@json_option
def doctor(cache_dir: Path, as_json: bool) -> None:
    """Examine Python, torch and its companions, the GPUs, HDF5, the disk of the caches, memory, cores, Slurm and extras.

    Each line is ok, note, or fix with what to do. Exit code 2 where something must be fixed.
    """
    found: list[Finding] = []
    for finding in examine(cache_dir):
        found.append(finding)
        if not as_json:
            answer(_finding_line(finding))
    broken = [finding.check for finding in found if finding.verdict == "fix"]
    if as_json:
        answer_json({"fit": not broken, "findings": found})
    if broken:
        raise SetupError(f"To be fixed: {', '.join(broken)}.")


def _finding_line(finding: Finding) -> str:
    advice = f"; {finding.advice}" if finding.advice else ""
    return f"{finding.verdict:<5} {finding.check + ':':<18} {finding.found}{advice}"


@click.command(short_help="List the recipes, or print one.")
@click.argument("name", metavar="[NAME]", required=False)
def recipes(name: str | None) -> None:
    """List the recipes with what each is for, or print the TOML of the one that is named."""
    if name is not None:
        answer_exactly(recipe_text(name).removesuffix("\n"))
        return
    width = max(map(len, recipe_names()))
    for each in recipe_names():
        purpose = recipe_text(each).partition("\n")[0].removeprefix("# ")
        answer(f"{each:<{width}}  {purpose}")


@click.command(cls=ConfiguredCommand, short_help="Write a commented config.toml for your data.")
@configured
@click.option(
    "-o", "--output", default="config.toml", show_default=True, type=click.Path(path_type=Path), help="A new file."
)
def init(config: Config, output: Path) -> None:
    """Write every option with its meaning and its value for your data into a TOML file, for `layerwise run --config`.

    Takes the options of `run`. Looks at the data, and overwrites nothing.
    """
    if os.path.lexists(output):
        raise RunError(f"{output} exists; delete it, or name another file with -o.")
    from layerwise.engines.plan import look  # imports torch, which --help need not wait for

    data, labels = look(config)
    if not output.parent.is_dir():
        raise RunError(f"{output} cannot be written: there is no folder {output.parent}; make it, or name another one.")
    write_atomically(output, commented(config).encode())
    skipped = f", {len(data.skipped)} files skipped" if data.skipped else ""
    say(f"{output}: for {len(data.ids)} samples from {config.data.source}{skipped}", *getattr(data, "notes", ()))
    say(f"labels for probes: {', '.join(labels) or 'none; name a file of them with --labels'}")
    if config.training.stages == 1:
        say(END_TO_END)
    scheduler = config.engine.scheduler
    named = [*function_flags(config), *(["--scheduler", scheduler] if scheduler else [])]
    options = shlex.join(["--config", str(output), *named])
    say("next:", f"  layerwise plan {options}", f"  layerwise run {options}")


@click.command(cls=ConfiguredCommand, short_help="Predict what a run would take; runs nothing.")
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
        with working("rehearsing") as show:
            forecast = plan_library(config, notify=show)
        if as_json:
            answer_json(forecast)
        else:
            answer(forecast_table(forecast), *forecast_lines(forecast))
        return
    with working("rehearsing") as show:
        forecasts = sweep(config, show)
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

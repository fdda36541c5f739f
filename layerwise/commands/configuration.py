"""`layerwise recipes` and `layerwise init`: the defaults of experiments, and a configuration to edit."""

import os
import shlex
from pathlib import Path

import click

from layerwise.commands.options import configured
from layerwise.config import Config, commented, function_flags, recipe_names, recipe_text
from layerwise.errors import RunError
from layerwise.files import write_atomically
from layerwise.forecast import END_TO_END
from layerwise.report.printing import answer, answer_exactly, say


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


@click.command(short_help="Write a commented config.toml for your data.")
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

    data = look(config)
    if not output.parent.is_dir():
        raise RunError(f"{output} cannot be written: there is no folder {output.parent}; make it, or name another one.")
    write_atomically(output, commented(config).encode())
    skipped = f", {len(data.skipped)} files skipped" if data.skipped else ""
    say(f"{output}: for {len(data.ids)} samples from {config.data.source}{skipped}")
    say(f"labels for probes: {', '.join((*data.labels, *data.frame_label_names)) or 'none'}")
    if config.training.stages == 1:
        say(END_TO_END)
    options = shlex.join(["--config", str(output), *function_flags(config)])
    say("next:", f"  layerwise plan {options}", f"  layerwise run {options}")

"""What commands share: the directory argument, --json, and every option of the configuration."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from layerwise import config as configuration

directory_argument = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
"""A run directory; `status` and `report` take that of a comparison, too."""

network_option = click.option(
    "--net", "network", help="package.module:function of a network of your own, as the run was given it."
)

data_option = click.option(
    "--data", help="package.module:function of data of your own, as the run was given it; or where its data lie now."
)

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for scripts.")


class ConfiguredCommand(click.Command):
    """Its help lists the options in groups, with the defaults of the recipe and the data that are named before --help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        named = {option.key.replace(".", "__"): option for option in configuration.options() if option.flag}
        data = ctx.params.get("data__source")
        defaults = configuration.resolve(ctx.params.get("recipe"), None, {"data.source": data} if data else {})
        titles = configuration.section_titles()
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], **{title: [] for title in titles.values()}}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            option = named.get(parameter.name or "")
            if record is None:
                continue
            title = titles.get(option.key.partition(".")[0], "Options") if option else "Options"
            value = configuration.value_of(defaults, option.key) if option else None
            said = value in (None, "", ()) or "default:" in record[1].lower()
            groups[title].append((record[0], record[1] if said else f"{record[1]} [default: {value}]"))
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def configured(command: Callable[..., None], default_out: str = "runs/{recipe}") -> Callable[..., None]:
    """Adds --recipe, --config, every flag of the configuration and --set; the command is called with `config`."""

    @functools.wraps(command)
    def with_options(recipe: str | None, config_file: Path | None, assignments: tuple[str, ...], **flags: Any) -> None:
        named = {option.key.replace(".", "__"): option.key for option in configuration.options() if option.flag}
        overrides = {named[name]: flags[name] for name in named if flags[name] is not None}
        overrides |= dict(configuration.parse_assignment(text) for text in assignments)
        others = {name: value for name, value in flags.items() if name not in named}
        command(config=configuration.resolve(recipe, config_file, overrides, default_out), **others)

    recipes = f"Defaults of an experiment: {', '.join(configuration.recipe_names())}."
    added = [
        click.option("--recipe", help=recipes, is_eager=True),
        click.option(
            "--config", "config_file", type=click.Path(path_type=Path), help="TOML file of options, over the recipe."
        ),
        *(_flag(option, option.flag) for option in configuration.options() if option.flag),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Any other option, such as objective.negatives=16.",
        ),
    ]
    for add in reversed(added):
        with_options = add(with_options)
    return with_options


def _flag(option: configuration.Option, flag: str) -> Callable[..., Any]:
    # The help is eager too: it is to know the data where these stand before it.
    name, eager = option.key.replace(".", "__"), option.key == "data.source"
    return click.option(flag, name, help=option.help, metavar=option.kind, is_eager=eager)

"""`layerwise recipes`: the defaults that experiments begin with."""

import click

from layerwise.config import recipe_names, recipe_text


@click.command(short_help="List the recipes, or print one.")
@click.argument("name", metavar="[NAME]", required=False)
def recipes(name: str | None) -> None:
    """List the recipes with what each is for, or print the TOML of the one that is named."""
    if name is not None:
        click.echo(recipe_text(name), nl=False)
        return
    width = max(map(len, recipe_names()))
    for each in recipe_names():
        purpose = recipe_text(each).partition("\n")[0].removeprefix("# ")
        click.echo(f"{each:<{width}}  {purpose}")

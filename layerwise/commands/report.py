"""`layerwise report`: one page to look at."""

from pathlib import Path

import click


@click.command(short_help="Write one page with tables and figures.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def report(directory: Path) -> None:
    """Write DIR/report.html, which shows the run or the comparison in DIR and needs no network.

    Its figures also lie in DIR/plots, as .svg and .png.
    """
    from layerwise.report.html import write_report  # imports matplotlib, which --help need not wait for

    click.echo(f"{write_report(directory)} (figures: {directory / 'plots'})")

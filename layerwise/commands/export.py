"""`layerwise export`: the encoder and its model card, for others."""

from pathlib import Path

import click
from rich.console import Console


@click.command(short_help="Hand the encoder over as safetensors, pt2 or ONNX.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--format", default="safetensors", show_default=True, metavar="FORMAT", help="safetensors, pt2 or onnx.")
@click.option("-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--net", help="package.module:function of a network of your own, as the run was given it.")
def export(directory: Path, format: str, output: Path, net: str | None) -> None:
    """Write the encoder of the run in DIR and a model card into FOLDER.

    What was written is read back and compared with the encoder before the folder gets its name.
    """
    from layerwise.encoder.export import export as export_library  # imports torch, which --help need not wait for

    with Console(stderr=True).status("exporting", spinner="dots"):
        exported = export_library(directory, output, format, network=net)
    same = f"differ from the encoder's by at most {exported.difference:.1g} of the largest"
    agreement = same if exported.difference else "are those of the encoder, bit by bit"
    click.echo(f"{output}: {format}, README.md says how to use it; its features {agreement}")
    if exported.fixed:
        click.echo(f"its input has a fixed size: {exported.fixed}")

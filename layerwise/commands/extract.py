"""`layerwise extract`: features of new recordings or pictures."""

from pathlib import Path

import click
from rich.console import Console

from layerwise.stop import stop_on_signals
from layerwise.units import size


@click.command(short_help="Write features of new recordings or pictures.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("source", metavar="INPUT")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="NAME.npy or NAME.h5")
@click.option("--stage", type=int, help="Outputs of this stage; default: the last.")
@click.option("--mean", is_flag=True, help="One row per file, the mean of its frames.")
@click.option("--gpu-mem", help="Most device memory, such as 4GB; default: that of the run.")
@click.option("--net", help="package.module:function of a network of your own, as the run was given it.")
@click.option("--device", help="auto, cpu, cuda or cuda:N; default: that of the run.")
def extract(
    directory: Path,
    source: str,
    output: Path,
    stage: int | None,
    mean: bool,
    gpu_mem: str | None,
    net: str | None,
    device: str | None,
) -> None:
    """Pass INPUT through the trained encoder in DIR, stage by stage, and write what comes out.

    INPUT is a file, a folder, or KIND:PATH as --data takes it. Files that cannot be used are skipped and named.
    """
    from layerwise.encoder.extract import extract as extract_library  # imports torch, which --help need not wait for

    console = Console(stderr=True)
    with stop_on_signals() as stop, console.status("extracting", spinner="dots") as shown:
        extracted = extract_library(
            directory,
            source,
            output,
            stage=stage,
            mean=mean,
            gpu_mem=gpu_mem,
            device=device,
            network=net,
            stop=stop,
            notify=lambda line: shown.update(f"extracting: {line}"),
        )
    click.echo(
        f"{output}: stage {extracted.stage}, {extracted.samples} samples, {extracted.rows} rows, "
        f"{size(output.stat().st_size)}; device peak {size(extracted.peak_bytes)}"
    )
    if extracted.skipped:
        click.echo(f"{len(extracted.skipped)} files skipped:")
    for entry in extracted.skipped:
        click.echo(f"  {entry.path}: {entry.reason}")

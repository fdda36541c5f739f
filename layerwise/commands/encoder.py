"""`layerwise extract` and `layerwise export`: features of new samples, and the encoder for other programs."""

from pathlib import Path
from typing import Any

import click

from layerwise.commands.options import directory_argument, network_option
from layerwise.errors import ConfigError
from layerwise.report.printing import measuring, say
from layerwise.stop import stop_on_signals
from layerwise.units import size

FORMATS = ("npy", "h5", "npz", "parquet")
"""Of features."""


@click.command(short_help="Write features of new recordings or pictures.")
@directory_argument
@click.argument("source", metavar="INPUT")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="NAME.npy, .h5, .npz or .parquet")
@click.option("--format", metavar="FORMAT", help="npy, h5, npz or parquet; default: by the ending of NAME.")
@click.option("--stage", type=int, help="Outputs of this stage; default: the last.")
@click.option("--mean", is_flag=True, help="One row per file, the mean of its frames.")
@click.option("--gpu-mem", help="Most device memory, such as 4GB; default: that of the run.")
@network_option
@click.option("--labels", default="", help="CSV file of labels, as run takes it, to be written beside the features.")
@click.option("--device", help="auto, cpu, cuda or cuda:N; default: that of the run.")
def extract(directory: Path, source: str, output: Path, format: str | None, **options: Any) -> None:
    """Pass INPUT through the trained encoder in DIR, stage by stage, and write what comes out.

    INPUT is a file, a folder, or KIND:PATH as --data takes it. Files that cannot be used are skipped and named. Beside the
    features stand ids, offsets and labels, and the time (or place) of each row, hop and offset.
    """
    output = _with_ending(output, format)
    from layerwise.encoder.extract import extract as extract_library  # imports torch, which --help need not wait for

    with stop_on_signals() as stop, measuring("extracting") as show:
        extracted = extract_library(directory, source, output, stop=stop, notify=show, **options)
    say(
        f"{output}: stage {extracted.stage}, {extracted.samples} samples, {extracted.rows} rows, "
        f"{size(output.stat().st_size)}; device peak {size(extracted.peak_bytes)}"
    )
    if extracted.skipped:
        say(f"{len(extracted.skipped)} files skipped:")
    for entry in extracted.skipped:
        say(f"  {entry.path}: {entry.reason}")


def _with_ending(output: Path, format: str | None) -> Path:
    """The name with the ending of the format. Raises ConfigError where it has another one."""
    if format is None or output.suffix == f".{format}":
        return output
    if format not in FORMATS or output.suffix.removeprefix(".") in FORMATS:
        raise ConfigError(
            f"--format {format}: write one of {', '.join(FORMATS)}, and the same at the end of {output}, or none."
        )
    return output.with_name(f"{output.name}.{format}")


@click.command(short_help="Hand the encoder over as safetensors, a state dict, pt2 or ONNX.")
@directory_argument
@click.option(
    "--format",
    default="safetensors",
    show_default=True,
    metavar="FORMAT",
    help="safetensors, for layerwise.load; state-dict, for load_state_dict of the network's own module; pt2 or onnx.",
)
@click.option("-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path), required=True, help="A new folder.")
@network_option
def export(directory: Path, format: str, output: Path, network: str | None) -> None:
    """Write the encoder of the run in DIR and a model card into FOLDER.

    What was written is read back and compared with the encoder before the folder gets its name.
    """
    from layerwise.encoder.export import export as export_library  # imports torch, which --help need not wait for

    with measuring("exporting") as show:
        exported = export_library(directory, output, format, network=network, notify=show)
    same = f"differ from the encoder's by at most {exported.difference:.1g} of the largest"
    agreement = same if exported.difference else "are those of the encoder, bit by bit"
    say(f"{output}: {format}, README.md says how to use it; its features {agreement}")
    if exported.left_out:
        say(f"left out, as the cut does not reach them: {', '.join(exported.left_out)}")
    if exported.fixed:
        say(f"its input has a fixed size: {exported.fixed}")

"""Hands a trained encoder over: a folder with the encoder in some format, checked, and a model card."""

import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from layerwise.encoder.agreement import largest_difference
from layerwise.encoder.card import Exported, model_card
from layerwise.encoder.formats import FORMATS, without_places
from layerwise.encoder.load import Given, entry_of, load_stages
from layerwise.encoder.model import Encoder
from layerwise.errors import ExportError
from layerwise.files import write_atomically
from layerwise.near import did_you_mean
from layerwise.run_directory import open_run


def export(
    run_directory: str | Path, folder: str | Path, format: str = "safetensors", *, network: Given = None
) -> Exported:
    """Writes the encoder of a finished run and its model card into a new folder.

    format: safetensors (for `layerwise.load`), pt2 (a torch.export program) or onnx. network: as in `load`. The folder is
    there only if what it holds computes what the encoder does. Raises RunError, ConfigError and ExportError.
    """
    run_directory, folder = Path(run_directory), Path(folder)
    if format not in FORMATS:
        raise ExportError(f"--format {format}: there are {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    if folder.exists():
        raise ExportError(f"{folder} exists; delete it, or name another folder.")
    paths, state = open_run(run_directory)
    origin, stages = load_stages(run_directory, None, network)
    origin = replace(origin, config=without_places(origin.config))
    encoder = Encoder(entry_of(origin), [stage.module for stage in stages]).eval()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            inside = Path(temporary, folder.name)
            inside.mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch about itself; what matters is compared
                written = FORMATS[format](encoder, origin, network, inside)
                difference = largest_difference(written.computes, encoder, written.inputs)
            exported = Exported(folder, format, difference, written.fixed)
            card = model_card(encoder, origin, paths, state, exported)
            write_atomically(inside / "README.md", card.encode())
            inside.rename(folder)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}.") from None
    return exported

"""Hands a trained encoder over: a folder with the encoder in some format, checked, and a model card."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

from layerwise.config import result_toml
from layerwise.encoder.entry import Entry
from layerwise.encoder.load import Given, entry_of, load, load_stages, network_of, own_weights
from layerwise.encoder.model import Encoder
from layerwise.encoder.program import Computes, largest_difference, record, trial_inputs
from layerwise.errors import ExportError, did_you_mean
from layerwise.events import NotifyProgress, Progress, unseen
from layerwise.files import errors_of_writing, exclusive, write_atomically
from layerwise.nets.layer import vectors
from layerwise.nets.network import copied, ranges
from layerwise.run_store import RunState, RunStore, open_run
from layerwise.training.checkpoint import load_arrays, save_arrays, to_host
from layerwise.training.encoder import Origin, save_encoder
from layerwise.units import percent, size


@dataclass(frozen=True, slots=True)
class Exported:
    """An export that was checked."""

    folder: Path
    format: str
    difference: float
    """The largest one found between its output and the encoder's own, in units of the largest feature."""
    fixed: str
    """Sizes of the input that cannot be changed; empty where all can."""
    left_out: tuple[str, ...]
    """Of a state dict: weights of the network's own module that the cut does not reach."""


@dataclass(frozen=True, slots=True)
class Written:
    """An encoder in some format."""

    computes: Computes
    """What was written, read back."""
    inputs: list[torch.Tensor]
    """Batches to try it with."""
    fixed: str = ""
    """Sizes of the input that cannot be changed."""
    left_out: tuple[str, ...] = ()
    """Of a state dict: weights of the network's own module that the cut does not reach."""


def write_safetensors(encoder: Encoder, origin: Origin, network: Given, folder: Path) -> Written:
    """encoder.safetensors and config.toml, for layerwise.load."""
    write_atomically(folder / "config.toml", result_toml(origin.config).encode())
    save_encoder(folder / "encoder.safetensors", to_host(encoder.state_dict()), origin)
    return Written(load(folder, network=network), trial_inputs(encoder))


def write_state_dict(encoder: Encoder, origin: Origin, network: Given, folder: Path) -> Written:
    """model.safetensors, for the load_state_dict of the network's own module.

    Read back into a module with other weights. Raises ExportError where they do not fit it.
    """
    path, of = folder / "model.safetensors", network_of(origin, network, folder)
    save_arrays(path, own_weights(of, to_host(encoder.state_dict())), {"format": "pt"})
    saved = {name: torch.from_numpy(value) for name, value in load_arrays(path, "export again.")[0].items()}
    fresh: nn.Module = copied(encoder if of.model is None else of.model)
    left_out = tuple(name for name in fresh.state_dict() if name not in saved)
    with torch.no_grad():
        for name, tensor in fresh.state_dict().items():
            if name in saved:
                tensor.zero_()
    if unexpected := fresh.load_state_dict(saved, strict=False).unexpected_keys:
        raise ExportError(
            f"The network's own module has no {unexpected[0]}; export as safetensors, and please report this."
        )
    computes = fresh.eval() if of.model is None else OwnModule(encoder.entry, fresh).eval()
    return Written(computes, trial_inputs(encoder), left_out=left_out)


class OwnModule(nn.Module):
    """A network's own module in the place of an encoder's layers, to be compared with them."""

    def __init__(self, entry: Entry, model: nn.Module) -> None:
        super().__init__()
        self.entry, self.model = entry, model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, L, C) of what the encoder takes."""
        frames = self.entry(x)
        y = self.model(frames.flatten(0, 1))
        y = getattr(y, "last_hidden_state", y)  # as Hugging Face's give it
        return vectors((y.transpose(1, 2) if y.dim() == 3 else y).unflatten(0, frames.shape[:2]))


def write_pt2(encoder: Encoder, origin: Origin, network: Given, folder: Path) -> Written:
    """encoder.pt2, a program for torch.export.load."""
    path = folder / "encoder.pt2"
    program, inputs, fixed = record(encoder)
    content = BytesIO()
    torch.export.save(program, content)  # which would end the process on a disk that is full
    write_atomically(path, content.getbuffer())
    return Written(torch.export.load(path).module(), inputs, fixed)


def write_onnx(encoder: Encoder, origin: Origin, network: Given, folder: Path) -> Written:
    """encoder.onnx, a graph for any ONNX runtime.

    Raises ExportError where packages are missing, or cannot do what the encoder does.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ExportError(f"--format onnx needs {' and '.join(missing)}: pip install 'layerwise[onnx]'")
    path, takes = folder / "encoder.onnx", encoder.entry.takes
    program, inputs, fixed = record(encoder)
    try:
        graph = torch.onnx.export(program, dynamo=True, input_names=[takes], output_names=["features"], verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise _not_in_onnx("torch.onnx", error) from error
    assert graph is not None  # as it is where the exporter is torch.export's
    graph.save(path)
    return Written(_onnx_session(path, takes), inputs, fixed)


def _not_in_onnx(what: str, error: BaseException) -> ExportError:
    while error.__cause__ is not None:  # torch.onnx tells last what it was at, and first what was missing
        error = error.__cause__
    reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return ExportError(f"{what} cannot do what the encoder does ({reason}); export it as pt2 or safetensors.")


def _onnx_session(path: Path, takes: str) -> Computes:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as raised

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except (raised.NotImplemented, raised.InvalidGraph) as error:
        raise _not_in_onnx("onnxruntime", error) from error
    return lambda x: torch.from_numpy(session.run(None, {takes: x.numpy()})[0])


FORMATS: dict[str, Callable[[Encoder, Origin, Given, Path], Written]] = {
    "safetensors": write_safetensors,
    "state-dict": write_state_dict,
    "pt2": write_pt2,
    "onnx": write_onnx,
}
"""Each writes its files into a folder and reads them back."""


def export(
    run_directory: str | Path,
    folder: str | Path,
    format: str = "safetensors",
    *,
    network: Given = None,
    notify: NotifyProgress = unseen,
) -> Exported:
    """Writes the encoder of a finished run and its model card into a new folder.

    format: safetensors (for `layerwise.load`), state-dict (for `load_state_dict` of the network's own module), pt2 (a
    torch.export program) or onnx. network: as in `load`. The folder is there only if what it holds computes what the encoder
    does. Raises RunError, ConfigError and ExportError.
    """
    run_directory, folder = Path(run_directory), Path(folder)
    if format not in FORMATS:
        raise ExportError(f"--format {format}: there are {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    _refuse_existing(folder)
    notify(Progress("reading", 0, 3))
    store, state = open_run(run_directory)
    origin, stages = load_stages(run_directory, None, network)
    encoder = Encoder(entry_of(origin), [stage.module for stage in stages]).eval()
    with errors_of_writing(folder, ExportError), _unfinished(folder) as inside:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch about itself; what matters is compared
            notify(Progress("writing", 1, 3))
            written = FORMATS[format](encoder, origin, network, inside)
            notify(Progress("comparing", 2, 3))
            difference = largest_difference(written.computes, encoder, written.inputs)
        exported = Exported(folder, format, difference, written.fixed, written.left_out)
        card = _model_card(encoder, origin, store, state, exported)
        write_atomically(inside / "README.md", card.encode())
        inside.rename(folder)
    return exported


def _model_card(encoder: Encoder, origin: Origin, store: RunStore, state: RunState, exported: Exported) -> str:
    """The text of card.md.jinja, filled in: Markdown."""
    environment = Environment(
        loader=PackageLoader("layerwise.encoder", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"size": size, "percent": percent}
    return environment.get_template("card.md.jinja").render(
        encoder=encoder,
        origin=origin,
        config=origin.config,
        state=state,
        exported=exported,
        example=encoder.entry.sizes(encoder.shortest, encoder.geometry.hop)[0],
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        stages=_stages(encoder, origin, state),
        probes=store.read_probes(state),
    )


def _stages(encoder: Encoder, origin: Origin, state: RunState) -> list[dict[str, Any]]:
    """Rows of the table of stages."""
    layers = list(encoder.layers.values())
    # Trained all at once, the stages share one record.
    records = state.stages if len(state.stages) == len(origin.cut) else state.stages * len(origin.cut)
    return [
        {
            "layers": len(cut),
            "parameters": sum(weight.numel() for index in cut for weight in layers[index].parameters()),
            "record": record,
        }
        for cut, record in zip(ranges(origin.cut), records, strict=True)
    ]


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """An empty folder beside it, to be renamed; what a kill has left of one is deleted.

    Raises ExportError where another process is at it, or has made the folder.
    """
    beside = folder.with_name(f".{folder.name}.part")
    if beside.is_symlink():
        beside.unlink()
    with exclusive(beside / "lock", ExportError(f"Another process is writing {folder}; wait for it, or name another.")):
        _refuse_existing(folder)
        try:
            shutil.rmtree(beside / folder.name, ignore_errors=True)
            (beside / folder.name).mkdir()
            yield beside / folder.name
        finally:
            shutil.rmtree(beside)


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        raise ExportError(f"{folder} exists; delete it, or name another folder.")

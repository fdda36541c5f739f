"""What is saved of a stage, and how it comes back: safetensors throughout, so loading one runs no code.

A checkpoint is one file, replaced whole: weights, predictors, optimizer, best weights so far, and the progress as JSON in
its header. All of it is copied to host memory as numpy arrays, so that nothing of it counts on the device.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
import torch
from pydantic import BaseModel, ConfigDict, Json, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from layerwise.errors import RunError
from layerwise.files import write_atomically
from layerwise.memory.meter import AnyMeter, host_tensor, uncounted
from layerwise.run_store import RunStore, StageRecord
from layerwise.training.header import check_header
from layerwise.training.simultaneous import AnyTrainer
from layerwise.training.trainer import StageTrainer

T = TypeVar("T")
Arrays = dict[str, np.ndarray]


@dataclass(slots=True)
class Progress:
    """Where the training of a stage stands; the next batch is step `step` of epoch `epoch`, both from 0."""

    epoch: int = 0
    """Over all rounds."""
    first_epoch: int = 0
    """Of this round."""
    step: int = 0
    loss_sum: float = 0.0
    """Over the steps of this epoch that are done."""
    accuracy_sum: float = 0.0
    best_loss: float | None = None
    """Lowest held-out loss of this round."""
    plateau_loss: float | None = None
    """Held-out loss at the last improvement that counted."""
    plateau_epochs: int = 0
    """Epochs since then."""
    seconds: float = 0.0
    """Spent on training, over all starts."""
    shrunk: tuple[int, int] | None = None
    """Micro-batch and parts, where a step ran out of memory and changed them."""
    loss_scale: float = 1.0
    good_steps: int = 0
    """See `LossScale`."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per finished epoch."""
    peak_bytes: int = 0
    """Highest of this round on the device, over all starts."""
    peak_by_kind: dict[str, int] = field(default_factory=dict)
    """Of what it was made, in bytes."""

    def note_peak(self, meter: AnyMeter) -> None:
        """Takes over the peak of this start where it is the highest so far."""
        peak = meter.peak
        if peak > self.peak_bytes:
            self.peak_bytes = peak
            self.peak_by_kind = {str(kind): most for kind, most in meter.peak_by_kind.items()}

    def on_other_input(self) -> "Progress":
        """At the beginning of the next round, or behind a stage that has learnt more: losses and peak are measured anew."""
        return replace(
            self,
            first_epoch=self.epoch,
            step=0,
            loss_sum=0.0,
            accuracy_sum=0.0,
            best_loss=None,
            plateau_loss=None,
            plateau_epochs=0,
            peak_bytes=0,
            peak_by_kind={},
        )


class _Metadata(BaseModel):
    """Of a checkpoint."""

    model_config = ConfigDict(strict=True, extra="forbid")
    made_for: str
    progress: Json[Progress]


def to_host(tensors: dict[str, torch.Tensor]) -> Arrays:
    """Copies in host memory, independent of the device."""
    with uncounted():
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


def weights_of(module: nn.Module) -> Arrays:
    """Copies of its parameters and buffers in host memory."""
    with uncounted():
        return to_host(module.state_dict())


def load_weights(module: nn.Module, weights: Arrays) -> None:
    """Copies host arrays into the module, buffers included. Raises RunError where names or shapes differ."""
    with torch.no_grad(), uncounted():  # into tensors that are there already
        tensors = module.state_dict()
        if {n: value.shape for n, value in weights.items()} != {n: tuple(t.shape) for n, t in tensors.items()}:
            raise RunError("The saved weights belong to another network; start anew with --overwrite or another --out.")
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(weights[name]))


def save_arrays(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """One safetensors file with a digest of all that it holds, replaced atomically. Raises RunError.

    The same arrays and metadata make the same bytes.
    """
    content = safetensors.numpy.save(arrays, metadata | {"digest": digest_of_file(arrays, metadata)})
    stop = 8 + int.from_bytes(content[:8], "little")
    header = _in_order(content[8:stop])
    write_atomically(path, len(header).to_bytes(8, "little"), header, memoryview(content)[stop:])


def _in_order(header: bytes) -> bytes:
    """The header of a safetensors file with its metadata sorted: safetensors writes them in another order each time."""
    parsed = json.loads(header)
    ordered = json.dumps(parsed | {"__metadata__": dict(sorted(parsed["__metadata__"].items()))}).encode()
    return ordered + b" " * (-len(ordered) % 8)  # arrays begin at a multiple of 8


def load_arrays(path: Path, way_out: str) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata that `save_arrays` wrote.

    Raises RunError with the way out where the file is missing, or does not hold what was written.
    """
    check_header(path, way_out)
    try:
        with safe_open(path, "np") as file:
            arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}); {way_out}") from None
    if metadata.pop("digest", None) != digest_of_file(arrays, metadata):
        raise RunError(f"{path} is damaged: what it holds does not match its digest; {way_out}")
    return arrays, metadata


def load_stages(store: RunStore, records: Iterable[StageRecord]) -> Arrays:
    """The weights of trained stages, by their names in the whole network.

    Raises RunError where some are missing, damaged, or not those that the run has trained.
    """
    weights: Arrays = {}
    for record in records:
        path, way_out = store.weights(record.stage), f"train the stage again with --from-stage {record.stage}."
        found = load_arrays(path, way_out)[0]
        if digest(found) != record.weights:
            raise RunError(f"{path} does not hold the weights that this run has trained; restore it, or {way_out}")
        weights |= found
    return weights


def digest(arrays: Arrays) -> str:
    """SHA-256 over names, shapes, dtypes and values."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name]
        total.update(f"{name} {value.dtype} {value.shape}".encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()


def digest_of_file(arrays: Arrays, metadata: dict[str, str]) -> str:
    """SHA-256 over all that a file of arrays holds."""
    return hashlib.sha256(f"{digest(arrays)} {sorted(metadata.items())}".encode()).hexdigest()


def save_checkpoint(path: Path, made_for: str, progress: Progress, trainer: AnyTrainer, best: Arrays | None) -> None:
    """Everything that the next step needs. `made_for` names the stage's input and options."""
    progress.loss_scale, progress.good_steps = trainer.scale.factor, trainer.scale.good_steps
    progress.shrunk = (trainer.memory_plan.micro_batch, trainer.memory_plan.parts) if trainer.shrunk else None
    with uncounted():
        tensors = _named("module", trainer.module.state_dict()) | _named("objective", trainer.objective.state_dict())
    for prefix, optimizer in trainer.optimizers():
        for name, state in optimizer.state().items():
            tensors |= _named(f"optimizer/{prefix}{name}", state)
    save_arrays(
        path,
        to_host(tensors) | _named("best", best or {}),
        {"made_for": made_for, "progress": json.dumps(asdict(progress))},
    )


def load_checkpoint(path: Path, made_for: str, trainer: AnyTrainer) -> tuple[Progress, Arrays | None] | None:
    """Restores the stage and returns the progress and the best weights; None where there is no checkpoint.

    Raises RunError where it is damaged or was made for something else.
    """
    if not path.exists():
        return None
    begin_anew = "delete it and start the same command again, which trains the stage from its beginning."
    arrays, metadata = load_arrays(path, begin_anew)
    if metadata.get("made_for") != made_for:
        raise RunError(
            f"{path} was saved with other data or options, or by an earlier version of layerwise; give the old ones, or "
            "delete it and start the same command again, which trains the stage from its beginning."
        )
    try:
        progress = _Metadata.model_validate(metadata).progress
    except ValidationError:
        raise RunError(f"{path} was saved by another version of layerwise; {begin_anew}") from None
    load_weights(trainer.module, _under("module/", arrays))
    load_weights(trainer.objective, _under("objective/", arrays))
    for prefix, optimizer in trainer.optimizers():
        states = {name: _under(f"optimizer/{prefix}{name}/", arrays) for name in optimizer.parameters}
        optimizer.load({n: {key: host_tensor(value) for key, value in state.items()} for n, state in states.items()})
    trainer.scale.factor, trainer.scale.good_steps = progress.loss_scale, progress.good_steps
    if progress.shrunk and isinstance(trainer, StageTrainer):
        trainer.go_on_shrunk(*progress.shrunk)
    return progress, _under("best/", arrays) or None


def purpose_of(checkpoint: Path) -> str | None:
    """What a checkpoint was saved for, its `made_for`; None where there is none. Raises RunError where it cannot be read."""
    if not checkpoint.exists():
        return None
    way_out = "delete it and start the same command again, which goes on from the trained weights."
    check_header(checkpoint, way_out)
    try:
        with safe_open(checkpoint, "np") as file:
            return (file.metadata() or {}).get("made_for")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{checkpoint} cannot be read ({error}); {way_out}") from None


def _named(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

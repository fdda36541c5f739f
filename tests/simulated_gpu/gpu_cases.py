"""Small runs of every kind, on whichever device."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from layerwise.config import OWN, resolve
from layerwise.data.open import as_data
from layerwise.engines.run import RunResult, UserObjects, run
from layerwise.events import EpochDone, Event, Notify, StepDone, silent
from layerwise.nets.traced import traced_network

RNG = np.random.default_rng(0)
WAVES = [(RNG.standard_normal((200 + 40 * n, 1), dtype=np.float32), f"kind {n % 2}") for n in range(10)]
"""Streams of different lengths, one channel."""
PICTURES = [(Image.fromarray(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)), f"kind {n % 2}") for n in range(10)]

SPEECH = {
    "net.name": "speech",
    "net.width": 8,
    "net.context": 8,
    "net.kernels": [10, 8],
    "net.strides": [5, 4],
    "net.paddings": [2, 2],
    "data.frames": "steps",
    "data.window": 160,
}
PATCHES = {
    "net.name": "vision",
    "net.width": 4,
    "net.blocks": [1, 1],
    "net.stem_stride": 2,
    "data.frames": "patches",
    "data.picture": 16,
    "data.crop": 16,
    "data.patch": 8,
    "data.patch_stride": 4,
    "data.gray": False,
    "objective.skip": 0,
}
WHOLE = {
    "net.name": OWN,
    "data.frames": "whole",
    "data.picture": 8,
    "data.gray": False,
    "objective.name": "ntxent",
    "data.views": 2,
}
EVERYWHERE = {
    "data.source": OWN,
    "objective.steps": 2,
    "objective.negatives": 4,
    "objective.anchors": 8,
    "training.batch_size": 4,
    "training.max_epochs": 1,
    "training.lr": 1e-3,
    "memory.flops_per_byte": 16,
    "cache.block": "4kB",
    "cache.keep": "all",
}


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3, stride=2)
    )


class Reading(nn.Module):
    """Attention, normalisation and recurrence over the channels of a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.memory = nn.LSTM(12, 6, 2, batch_first=True, dropout=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.embed(x.mean(1)))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.memory(y)[0].mean(1)


def reading() -> nn.Module:
    torch.manual_seed(0)
    return Reading()


@dataclass(frozen=True)
class Case:
    """What is trained."""

    options: dict[str, Any]
    network: Callable[[], nn.Module] | None = None
    cut: tuple[int, ...] | None = None


SUPERVISED = {"objective.name": "supervised", "objective.label": "label"}
NO_RECURRENCE = {"net.context": 0}
CASES = {
    "speech": Case(SPEECH),
    "one stage, recomputed, micro-batches": Case(
        SPEECH | {"objective.projection": 4, "memory.recompute": "always", "memory.micro_batch": 2}, cut=(3,)
    ),
    "smallest, bfloat16": Case(
        SPEECH
        | {"memory.optimizer": "host", "memory.micro_batch": 1}
        | {"training.precision": "bfloat16", "cache.dtype": "bfloat16"}
    ),
    "hinge, float16, noise": Case(
        SPEECH
        | NO_RECURRENCE
        | {"objective.name": "hinge", "training.precision": "float16"}
        | {"training.input_noise": 0.2, "training.frame_dropout": 0.2}
    ),
    "ntxent, not cached": Case(
        SPEECH | NO_RECURRENCE | {"objective.name": "ntxent", "data.views": 2, "cache.policy": "never"}
    ),
    "supervised, rounds": Case(
        SPEECH | NO_RECURRENCE | SUPERVISED | {"training.rounds": 2, "training.max_epochs": 2, "cache.dtype": "int8"}
    ),
    "patches": Case(PATCHES),
    "whole, own network": Case(WHOLE, convolutions, (3, 2)),
    "whole, own network that reads, supervised": Case(WHOLE | SUPERVISED, reading, None),
    "simultaneous": Case(SPEECH | {"training.schedule": "simultaneous"}),
    "simultaneous, own network, hinge": Case(
        PATCHES | {"net.name": OWN, "training.schedule": "simultaneous", "objective.name": "hinge"},
        convolutions,
        (2, 3),
    ),
}


def run_case(case: Case, device: str, folder: Path, notify: Notify = silent, **changes: Any) -> RunResult:
    """Runs it in this folder; changes: further options."""
    places = {"training.device": device, "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
    config = resolve(overrides={**EVERYWHERE, **case.options, **places, **changes})
    data = as_data(WAVES if config.data.frames == "steps" else PICTURES, config.data)
    network = traced_network(case.network(), tuple(data.frame_shape)) if case.network else None
    return run(config, UserObjects(network, case.cut, data), notify=notify)


def outcome(case: Case, device: str, folder: Path) -> dict[str, Any]:
    """Weights, as bytes, and losses of a run in this folder."""
    losses: list[Any] = []

    def note(event: Event) -> None:
        if isinstance(event, StepDone | EpochDone):
            losses.append((event.stage, event.loss, event.accuracy))

    result = run_case(case, device, folder, note)
    return {
        "weights": {name: value.tobytes() for name, value in load_file(result.paths.encoder).items()},
        "losses": losses,
    }

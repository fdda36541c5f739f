"""The encoder as a torch.export program, for batches and lengths of any size where its layers allow that."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from layerwise.encoder.agreement import inputs_of_the_run, largest_difference
from layerwise.encoder.model import Encoder
from layerwise.encoder.stepwise import StepwiseRecurrence
from layerwise.errors import ExportError
from layerwise.nets.copying import copied
from layerwise.nets.frames import vectors
from layerwise.nets.sequence import Recurrence
from layerwise.training.encoder import Origin


@dataclass(frozen=True, slots=True)
class Program:
    """The encoder in tensor operations alone, without its checks."""

    exported: ExportedProgram
    inputs: list[torch.Tensor]
    """Batches that it takes, as different as it allows."""
    fixed: str
    """What must be as in the first of them; empty where nothing must."""


def record(encoder: Encoder, origin: Origin) -> Program:
    """The program with as few sizes fixed as can be. Raises ExportError where torch.export cannot record it at all."""
    tried = inputs_of_the_run(encoder, origin)
    sizes = tuple(axis for axis in range(1, tried[0].dim()) if len({x.shape[axis] for x in tried}) > 1)
    plain, reason = _Plain(encoder), ""
    for may_vary in dict.fromkeys(((0, *sizes), (0,), ())):
        inputs = inputs_of_the_run(encoder, origin, may_vary)
        try:
            with torch.no_grad():
                dynamic = dict.fromkeys(may_vary, Dim.DYNAMIC)
                exported = torch.export.export(plain, (inputs[0],), dynamic_shapes=(dynamic,))
            largest_difference(exported.module(), encoder, inputs)
        except (
            Exception
        ) as error:  # a layer that ties a size down makes torch.export raise nearly anything, or guard it
            reason = str(error).splitlines()[0]
            continue
        _forget_places(exported)
        return Program(exported, inputs, _fixed(encoder, inputs[0], may_vary))
    raise ExportError(f"torch.export cannot record the encoder ({reason}); export it as safetensors.")


def _forget_places(exported: ExportedProgram) -> None:
    """Takes out of the program where on this machine the code of each operation stands."""
    for module in exported.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _fixed(encoder: Encoder, example: torch.Tensor, may_vary: tuple[int, ...]) -> str:
    if len(may_vary) > 1 or (may_vary and not encoder.entry.ragged and encoder.entry.takes != "pictures"):
        return ""
    size = " x ".join(map(str, example.shape[1:]))
    what = {"waveforms": "samples of each waveform", "pictures": "for each picture"}
    of_one = f"{size} {what.get(encoder.entry.takes, 'values for each sample')}"
    return of_one if may_vary else f"{of_one}, {len(example)} in each batch"


class _Plain(nn.Module):
    """From the input to the features."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = copied(encoder).requires_grad_(False)
        layers = cast(nn.ModuleDict, self.encoder.layers)
        for name, layer in layers.items():
            if isinstance(layer, Recurrence):
                layers[name] = StepwiseRecurrence(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *_, features = self.encoder.frames_of_stages(self.encoder.entry(x))
        return vectors(features)

"""The encoder as a torch.export program, for batches and lengths of any size where its layers allow that.

And whether a program computes what the encoder does: on inputs of the run's shape, at several lengths and batch sizes.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.scan import scan
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from layerwise.encoder.model import Encoder
from layerwise.errors import ExportError
from layerwise.nets.comparison import reads_ids
from layerwise.nets.layer import vectors
from layerwise.nets.network import copied
from layerwise.nets.speech import Recurrence

TOLERANCE = 1e-4
"""Of the largest feature. Rounding makes about 1e-6 of it, any mistake far more."""

Computes = Callable[[torch.Tensor], torch.Tensor]


def trial_inputs(encoder: Encoder, may_vary: Collection[int] = (0, 1, 2, 3)) -> list[torch.Tensor]:
    """Three batches of noise: the first of the size that the run was trained on, others where these axes may vary."""
    generator = torch.Generator().manual_seed(0)
    sizes = encoder.entry.sizes(encoder.shortest, encoder.geometry.hop)
    draw: Callable[..., torch.Tensor] = torch.rand if encoder.entry.takes == "pictures" else torch.randn
    first = getattr(next(iter(cast(nn.ModuleDict, encoder.layers).values())), "unit", None)
    if isinstance(first, GraphModule) and reads_ids(first):
        draw = partial(_ids, 2)  # every table has two rows
    allowed = [tuple(n if axis in may_vary else sizes[0][axis] for axis, n in enumerate(size)) for size in sizes]
    # In order, and each size once.
    return [draw(*size, generator=generator) * encoder.entry.level for size in dict.fromkeys(allowed)]


def _ids(count: int, *size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(count, size, generator=generator).float()


def largest_difference(computes: Computes, encoder: Encoder, inputs: Sequence[torch.Tensor]) -> float:
    """From the encoder's own output, in units of its largest feature. Raises ExportError beyond TOLERANCE."""
    largest = 0.0
    for x in inputs:
        with torch.no_grad():
            expected, found = encoder(x), computes(x)
        if found.shape != expected.shape:
            raise ExportError(
                f"What was exported gives features of shape {tuple(found.shape)} for an input of {tuple(x.shape)}, and the "
                f"encoder {tuple(expected.shape)}; nothing was kept. Export as safetensors, and please report this."
            )
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not difference <= TOLERANCE:
            raise ExportError(
                f"What was exported differs from the encoder by {difference:.1g} of its largest feature for an input of "
                f"{tuple(x.shape)}; nothing was kept. Export as safetensors, and please report this."
            )
        largest = max(largest, difference)
    return largest


class StepwiseGRU(nn.Module):
    """What the GRU of a `Recurrence` computes, with its very weights, for any number of frames after export (Cho et al. 2014).

    One step is repeated, where torch.export would take nn.GRU apart into as many steps as its example has frames. The
    arithmetic is that of the formula in the documentation of nn.GRU; it differs from nn.GRU's kernel by rounding.
    """

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.gru = gru

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(B, L, C) to (B, L, hidden); the state at the end is not asked for."""
        gru = self.gru
        input_weight, weight, input_bias, bias = gru.all_weights[0]
        inputs = F.linear(x, input_weight, input_bias).transpose(0, 1)

        def step(state: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            carried = F.linear(state, weight, bias)
            reset_in, update_in, new_in = inputs.chunk(3, 1)
            reset_carried, update_carried, new_carried = carried.chunk(3, 1)
            reset, update = torch.sigmoid(reset_in + reset_carried), torch.sigmoid(update_in + update_carried)
            new = torch.tanh(new_in + reset * new_carried)
            state = new + update * (state - new)
            return state, state.clone()

        _, outputs = scan(step, x.new_zeros(x.shape[0], gru.hidden_size), inputs)
        return outputs.transpose(0, 1), None


def record(encoder: Encoder) -> tuple[ExportedProgram, list[torch.Tensor], str]:
    """The encoder in tensor operations alone, without its checks, and with as few sizes fixed as can be.

    Also gives batches that the program takes, as different as it allows, and what must be as in the first of them (empty
    where nothing must). Raises ExportError where torch.export cannot record the encoder at all.
    """
    tried = trial_inputs(encoder)
    sizes = tuple(axis for axis in range(1, tried[0].dim()) if len({x.shape[axis] for x in tried}) > 1)
    plain, reason = _Plain(encoder), ""
    for may_vary in dict.fromkeys(((0, *sizes), (0,), ())):
        inputs = trial_inputs(encoder, may_vary)
        try:
            with torch.no_grad():
                dynamic = dict.fromkeys(may_vary, Dim.DYNAMIC)
                exported = torch.export.export(plain, (inputs[0],), dynamic_shapes=(dynamic,))
            largest_difference(exported.module(), encoder, inputs)
        except Exception as error:  # a layer that ties a size down makes torch.export raise nearly anything
            reason = str(error).splitlines()[0]
            continue
        _forget_places(exported)
        return exported, inputs, _fixed(encoder, inputs[0], may_vary)
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
        for layer in self.encoder.layers.values():
            if isinstance(layer, Recurrence):
                layer.gru = cast(nn.GRU, StepwiseGRU(layer.gru))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *_, features = self.encoder.frames_of_stages(self.encoder.entry(x))
        return vectors(features)

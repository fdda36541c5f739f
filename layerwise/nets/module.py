"""A gradient-isolated module: consecutive layers that are trained together by one local objective."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerwise.nets.layer import Layer, mask_outside, mask_padding, take, vectors

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Of a layer's forward pass, and of the same pass where it is made again."""

PASSED_AT_ONCE = 32
"""Samples, where first weights are taken from them."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a stage's frames lie on the network's input: frame t is centred on input frame hop * t + offset."""

    hop: int = 1
    offset: float = 0.0

    def after(self, layer: Layer) -> "Geometry":
        """The geometry one layer further on."""
        middle = (layer.kernel - 1) / 2 - layer.padding
        return Geometry(self.hop * layer.stride, self.offset + self.hop * middle)


class Module(nn.Module):
    """Layers by their index in the whole network; the names of the weights are those of the stitched encoder."""

    def __init__(self, layers: Mapping[int, Layer]) -> None:
        super().__init__()
        named = nn.ModuleDict({str(index): layer for index, layer in layers.items()})
        self.layers = cast(Mapping[str, Layer], named)  # it does not tell its type checker what it holds

    def forward(self, x: torch.Tensor, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Input frames (B, L, *frame) with int64 [B] real lengths to (targets, outputs) of the local objective.

        Outputs (B, L', *frame) are what the next module reads, and the contexts of InfoNCE. Targets are the outputs
        too, or the inputs of the recurrent layer where the module ends in one.
        """
        targets = x
        for layer in self.layers.values():
            targets = x
            lengths = layer.out_length(lengths)
            x = mask_padding(layer(x), lengths)
        return (x if self.targets_are_outputs else targets), x

    def representations(
        self,
        x: torch.Tensor,
        lengths: np.ndarray,
        rows: torch.Tensor,
        recompute: Callable[[], Contexts] | None = None,
        cells: Sequence[int] = (),
    ) -> tuple[torch.Tensor, ...]:
        """The vectors that the local objective scores, of some frames only: what is not scored is not kept.

        x (B, L, *frame) with int64 [B] real lengths; rows: int64 [R] numbers b * L' + t of output frames, each once;
        recompute: keep what passes between the layers, and work the rest out again in the backward pass (activation
        checkpointing; Chen et al. 2016, arXiv 1604.06174), in these contexts; None: keep everything; cells: of each output
        frame, along each axis behind the channels, which are numbered in place of frames then. Gives (targets (R, C),
        contexts (R, D)), or one tensor where they are the same.
        """
        *below, last = self.layers.values()
        for layer in below:
            lengths = layer.out_length(lengths)
            x = checkpoint(layer, x, use_reentrant=False, context_fn=recompute) if recompute else layer(x)
            x = mask_padding(x, lengths)
        if not self.targets_are_outputs:
            return take(vectors(x), rows), take(vectors(last(x)), rows)
        outputs = last.before_activation(x)
        if outputs.dim() > 3:
            return (take(vectors(last.activation(outputs), cells), rows),)
        return (last.activation(take(outputs, rows)),)

    @property
    def begins_with_data(self) -> bool:
        """Whether first weights depend on the input."""
        return any(type(layer).first_weights_from is not Layer.first_weights_from for layer in self.layers.values())

    @torch.no_grad()
    def first_weights_from(self, x: torch.Tensor, rng: np.random.Generator, above: bool = False) -> torch.Tensor:
        """Sets those of each layer, from what the layers below make of x (B, L, *frame); on the host.

        above: whether the outputs of the last layer are asked for too. Gives them, or else its inputs.
        """
        *below, last = self.layers.values()
        for layer in below:
            layer.first_weights_from(x, rng)
            x = torch.cat([layer(some) for some in x.split(PASSED_AT_ONCE)])
        last.first_weights_from(x, rng)
        return torch.cat([last(some) for some in x.split(PASSED_AT_ONCE)]) if above else x

    def out_length(self, length: Any) -> Any:
        """Frames that come out of `length` frames (an int or an int64 array)."""
        for layer in self.layers.values():
            length = layer.out_length(length)
        return length

    def geometry(self, below: Geometry) -> Geometry:
        """Geometry of the outputs, given that of the inputs."""
        for layer in self.layers.values():
            below = below.after(layer)
        return below

    @property
    def targets_are_outputs(self) -> bool:
        """Whether the local objective predicts outputs; else it predicts the inputs of the recurrent last layer."""
        return not [*self.layers.values()][-1].recurrent

    @property
    def recurrent(self) -> bool:
        """Whether an output depends on all frames before it, however far."""
        return any(layer.recurrent for layer in self.layers.values())

    @property
    def frame_by_frame(self) -> bool:
        """Whether every output frame is made of the input frame at its place alone."""
        return all(layer.kernel == layer.stride == 1 and not layer.recurrent for layer in self.layers.values())

    def inputs_of(self, start: Any, stop: Any) -> tuple[Any, Any]:
        """The input frames that output frames start to stop (ints or int64 arrays) are made of.

        They may reach over both ends of the sample, where there are zeros. Not for recurrent modules.
        """
        for layer in reversed([*self.layers.values()]):
            start = start * layer.stride - layer.padding
            stop = (stop - 1) * layer.stride - layer.padding + layer.kernel
        return start, stop

    def window(
        self, x: torch.Tensor, firsts: np.ndarray, lengths: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Outputs of windows that are cut out of longer samples, as one pass over the samples would give them.

        x (B, n, *frame) holds the frames `inputs_of` some outputs: firsts[b] on (int64 [B], may be negative) of a sample
        of lengths[b] frames, zeros outside of it. Gives the same three of these outputs.
        """
        for layer in self.layers.values():
            x = layer.valid(x)
            firsts, lengths = (firsts + layer.padding) // layer.stride, layer.out_length(lengths)
            x = mask_outside(x, firsts, lengths)
        return x, firsts, lengths

    def push(self, x: torch.Tensor, states: list[Any] | None, last: bool) -> tuple[torch.Tensor, list[Any]]:
        """The next piece of one sample (1, n, *frame) to the outputs that are complete by now, and the new states."""
        states = states or [None] * len(self.layers)
        after = []
        for layer, state in zip(self.layers.values(), states, strict=True):
            x, state = layer.push(x, state, last)
            after.append(state)
        return x, after

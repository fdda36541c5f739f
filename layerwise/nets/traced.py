"""A traced network as layers: each unit of it, applied to every frame."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import fx, nn

from layerwise.nets.copying import copied
from layerwise.nets.identity import identity, structure
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network
from layerwise.nets.tracing import trace, why_uncut


def traced_network(model: nn.Module, frame_shape: tuple[int, ...]) -> Network:
    """The model as a network with one stage per unit, for frames of this shape (channels first).

    Its layers start from the model's present weights, whatever the seed. Raises ConfigError as `trace` does.
    """
    example = torch.zeros(1, *frame_shape)
    units = trace(model, example)
    layers = [partial(FrameUnit, unit, first=index == 0) for index, unit in enumerate(units)]
    return Network(
        layers,
        natural_cut=(1,) * len(layers),
        identity=identity(units),
        structure=structure(units),
        why_no_finer=partial(why_uncut, model, example),
    )


class FrameUnit(Layer):
    """A copy of a unit on torch's default device, applied to every frame.

    Frames have their channels first. A unit's output (N, tokens, D) has them last, as in a transformer: it is handed
    on as (N, D, tokens), and the next unit turns it back; `first` marks the unit that reads the network's input as is.
    """

    def __init__(self, unit: fx.GraphModule, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.unit = copied(unit)
        self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, *frame) to (B, L, *output frame)."""
        frames = x.flatten(0, 1)
        if frames.dim() == 3 and not self.first:
            # The unit may rely on the layout that the network itself would have given it, as .view() does.
            frames = frames.transpose(1, 2).contiguous()
        with _same_attention():
            y = self.unit(frames)
        return (y.transpose(1, 2) if y.dim() == 3 else y).unflatten(0, x.shape[:2])


@contextlib.contextmanager
def _same_attention() -> Iterator[None]:
    """Transformer layers in evaluation compute as in training: their other way has no rehearsal, and rounds differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

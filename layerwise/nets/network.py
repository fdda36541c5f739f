"""A network as a list of layers that are not built yet, and how it is cut into the modules of a run.

Layers are built one stage at a time, for the device where they are trained: the whole network never exists there.
Each layer is initialised from its own random stream, so its first weights do not depend on where the network is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layerwise.nets.copying import with_first_weights
from layerwise.nets.layer import Layer
from layerwise.nets.module import Module


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Network:
    """Layers from input to output, and the cut that the paper uses. Equal to itself alone, so that what is found out about
    it can be remembered."""

    layers: Sequence[Callable[[], Layer]]
    """Each call builds one layer on torch's default device."""
    natural_cut: tuple[int, ...]
    """Number of layers in each of the paper's modules; sums to len(layers)."""
    identity: str = ""
    """A hash of what it computes and of its first weights, where options do not say it."""
    structure: str = ""
    """The same without its weights."""
    why_no_finer: Callable[[], str] = str
    """A sentence on what forbids more layers, or nothing."""

    @property
    def natural_ranges(self) -> list[range]:
        """The layers of each of the paper's modules."""
        return ranges(self.natural_cut)

    def build(self, layers: range, seed: int, device: torch.device | str) -> Module:
        """The module of these layers on the device, with its first weights."""
        return Module(
            {index: with_first_weights(self.layers[index], _layer_seed(seed, index), device) for index in layers}
        )


def _layer_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)


def ranges(sizes: Sequence[int]) -> list[range]:
    """Stages of so many layers each, as ranges of layers: [2, 1] to [range(0, 2), range(2, 3)]."""
    stops = np.cumsum(sizes).tolist()
    return [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]

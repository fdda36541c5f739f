"""A network as a list of layers that are not built yet, and how it is cut into the modules of a run.

Layers are built one stage at a time, on the device where they are trained: the whole network never exists there.
Each layer is initialised from its own random stream, so its first weights do not depend on where the network is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layerwise.errors import ConfigError
from layerwise.nets.layer import Layer
from layerwise.nets.module import Module


@dataclass(frozen=True, slots=True)
class Network:
    """Layers from input to output, and the cut that the paper uses."""

    layers: Sequence[Callable[[], Layer]]
    """Each call builds one layer on torch's default device."""
    natural_cut: tuple[int, ...]
    """Number of layers in each of the paper's modules; sums to len(layers)."""

    def cut(self, stages: int | None) -> list[range]:
        """The layers of each stage. None: the paper's modules; fewer: neighbouring modules together; more: finer.

        Raises ConfigError where there are fewer layers than stages.
        """
        natural = len(self.natural_cut)
        if stages is None or stages == natural:
            sizes = list(self.natural_cut)
        elif stages < natural:
            sizes = [sum(group) for group in np.array_split(self.natural_cut, stages)]
        elif stages <= len(self.layers):
            sizes = [len(group) for group in np.array_split(range(len(self.layers)), stages)]
        else:
            raise ConfigError(
                f"--stages {stages}: this network can be cut into at most {len(self.layers)} stages; "
                f"give a number from 1 to {len(self.layers)} (its natural number is {natural})."
            )
        stops = np.cumsum(sizes)
        return [range(int(stop - size), int(stop)) for size, stop in zip(sizes, stops, strict=True)]

    def build(self, layers: range, seed: int, device: torch.device | str) -> Module:
        """The module of these layers on the device, with its first weights."""
        built = {}
        for index in layers:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                torch.manual_seed(_layer_seed(seed, index))
                built[index] = self.layers[index]()
        return Module(built)


def _layer_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)

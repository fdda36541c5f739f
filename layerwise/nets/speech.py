"""The paper's speech network: strided convolutions, then a GRU (Löwe et al. 2019, appendix A.2; van den Oord et al. 2018)."""

from collections.abc import Callable
from functools import partial

from layerwise.config import NetOptions
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network
from layerwise.nets.sequence import Convolution, Recurrence


def speech_network(net: NetOptions, channels_in: int = 1) -> Network:
    """One layer, and one of the paper's modules, per convolution; the GRU is the last where net.context is not 0."""
    layers: list[Callable[[], Layer]] = []
    for kernel, stride, padding in zip(net.kernels, net.strides, net.paddings, strict=True):
        layers.append(partial(Convolution, channels_in, net.width, kernel, stride, padding))
        channels_in = net.width
    if net.context:
        layers.append(partial(Recurrence, channels_in, net.context))
    return Network(layers, natural_cut=(1,) * len(layers))


def shortest_input(net: NetOptions, frames: int) -> int:
    """Fewest samples of audio that give `frames` frames of output."""
    geometry = zip(net.kernels, net.strides, net.paddings, strict=True)
    for kernel, stride, padding in reversed(list(geometry)):
        frames = max((frames - 1) * stride + kernel - 2 * padding, 1)
    return frames

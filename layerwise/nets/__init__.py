"""Networks and how they are cut into gradient-isolated modules."""

from functools import lru_cache

from layerwise.config import OWN, Config, NetOptions
from layerwise.errors import ConfigError
from layerwise.nets.convnet import convnet
from layerwise.nets.named import named_network
from layerwise.nets.network import Network
from layerwise.nets.speech import speech_network
from layerwise.nets.vision import vision_network


def build_network(net: NetOptions, frame_shape: tuple[int, ...], seed: int = 0) -> Network:
    """The network named by the options, for input frames of this shape (channels first).

    seed: of the first weights of a network that brings them along. Raises ConfigError.
    """
    if net.name in PRESETS:
        if net.at or net.weights:
            raise ConfigError(
                f"--net {net.name} is cut by --stages, and starts from --seed; leave --at and --weights out."
            )
        return _preset(net, frame_shape[0])
    if net.name == OWN:
        raise ConfigError(
            "The network of this run was given as an object, in Python; give it again there, as network=."
        )
    return named_network(net, frame_shape, seed)


@lru_cache(maxsize=8)
def _preset(net: NetOptions, channels: int) -> Network:
    """The same object for the same options: what is worked out for it once is known to all runs of a process."""
    return PRESETS[net.name](net, channels)


PRESETS = {"speech": speech_network, "vision": vision_network, "convnet": convnet}
"""Networks whose layers are options; all others are made elsewhere."""


def shortest_window(net: NetOptions, rows: int) -> int:
    """Fewest rows of input that give so many rows of output."""
    if net.name == "speech":
        geometry = zip(net.kernels, net.strides, net.paddings, strict=True)
        for kernel, stride, padding in reversed(list(geometry)):
            rows = max((rows - 1) * stride + kernel - 2 * padding, 1)
    return rows


def shortest_sample(config: Config) -> int:
    """Fewest steps of a sample that give the objective something to score at the last stage.

    The same for all objectives over rows, so that they train on the same samples and can be compared.
    """
    if config.data.frames != "steps":
        return 1
    data, frames = config.data, shortest_window(config.net, config.objective.skip + 2)
    return (frames - 1) * (data.frame_step or data.frame_length) + data.frame_length + config.objective.gap

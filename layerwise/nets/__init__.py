"""Networks and how they are cut into gradient-isolated modules."""

from layerwise.config import NetOptions
from layerwise.nets.network import Network
from layerwise.nets.speech import speech_network
from layerwise.nets.vision import vision_network


def build_network(net: NetOptions, frame_shape: tuple[int, ...]) -> Network:
    """The network named by the options, for input frames of this shape (channels first)."""
    make = {"speech": speech_network, "vision": vision_network}[net.name]
    return make(net, frame_shape[0])

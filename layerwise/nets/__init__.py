"""Networks and how they are cut into gradient-isolated modules."""

from layerwise.config import Config, NetOptions
from layerwise.nets.network import Network
from layerwise.nets.speech import shortest_input, speech_network
from layerwise.nets.vision import vision_network


def build_network(net: NetOptions, frame_shape: tuple[int, ...]) -> Network:
    """The network named by the options, for input frames of this shape (channels first)."""
    make = {"speech": speech_network, "vision": vision_network}[net.name]
    return make(net, frame_shape[0])


def rows_needed(config: Config) -> int:
    """Rows of output that give a contrastive objective at least one pair of context and target.

    Asked of every objective, so that all of them train on the same samples and can be compared.
    """
    return config.objective.skip + 2


def shortest_sample(config: Config) -> int:
    """Fewest frames of a sample that give the objective something to score at the last stage."""
    return shortest_input(config.net, rows_needed(config)) if config.net.name == "speech" else 1

"""Local objectives: what each module is trained for."""

from layerwise.config import ObjectiveOptions
from layerwise.objectives.infonce import InfoNCE
from layerwise.objectives.protocol import Objective


def build_objective(options: ObjectiveOptions, channels: int, context_channels: int) -> Objective:
    """The objective named by the options, for targets of `channels` and contexts of `context_channels`."""
    return InfoNCE(channels, context_channels, options.steps, options.skip, options.negatives, options.anchors)

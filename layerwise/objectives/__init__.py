"""Local objectives: what each module is trained for.

One's own is a class that keeps to `Objective`, and one line before the run that names it:

    layerwise.register_objective("mine", lambda options, shape: Mine(shape.channels))
"""

from collections.abc import Callable
from dataclasses import dataclass

from layerwise.config import ObjectiveOptions
from layerwise.errors import ConfigError
from layerwise.near import did_you_mean
from layerwise.objectives.contrastive import Contrastive
from layerwise.objectives.hinge import Hinge
from layerwise.objectives.infonce import InfoNCE
from layerwise.objectives.protocol import Objective
from layerwise.objectives.supervised import Supervised


@dataclass(frozen=True, slots=True)
class Scored:
    """What an objective will be given to score."""

    channels: int
    """C of the targets."""
    context_channels: int
    """D of the contexts."""
    classes: int
    """Of the label that `objective.label` names; 0 where it names none."""


Build = Callable[[ObjectiveOptions, Scored], Objective]


def _contrastive(kind: type[Contrastive]) -> Build:
    def build(options: ObjectiveOptions, scored: Scored) -> Objective:
        return kind(
            scored.channels,
            scored.context_channels,
            options.steps,
            options.skip,
            options.negatives,
            options.anchors,
        )

    return build


_BUILD: dict[str, Build] = {
    "infonce": _contrastive(InfoNCE),
    "hinge": _contrastive(Hinge),
    "supervised": lambda _, scored: Supervised(scored.context_channels, scored.classes),
}


def register_objective(name: str, build: Build) -> None:
    """Makes an objective known under a name of --objective. `build` is called with the options and what is scored.

    Raises ConfigError where the name is taken.
    """
    if name in _BUILD:
        raise ConfigError(f"There is an objective {name!r} already; give yours another name.")
    _BUILD[name] = build


def check_objective(name: str) -> None:
    """Raises ConfigError where there is no objective of that name."""
    if name not in _BUILD:
        raise ConfigError(
            f"--objective {name}: there is none of that name; there are {', '.join(_BUILD)}.{did_you_mean(name, _BUILD)}"
        )


def build_objective(options: ObjectiveOptions, scored: Scored) -> Objective:
    """The objective that the options name."""
    return _BUILD[options.name](options, scored)

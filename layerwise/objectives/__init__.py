"""Local objectives: what each module is trained for.

One's own is a class that keeps to `Objective`, and one line before the run that names it:

    layerwise.register_objective("mine", lambda options, shape: Mine(shape.channels))
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

from layerwise.config import ObjectiveOptions
from layerwise.errors import ConfigError, did_you_mean
from layerwise.objectives.both import PositionsAndRenderings
from layerwise.objectives.contrastive import Contrastive, Hinge, InfoNCE
from layerwise.objectives.pooled import NTXent, Supervised
from layerwise.objectives.protocol import Objective, ObjectiveModule


@dataclass(frozen=True, slots=True)
class Scored:
    """What an objective will be given to score."""

    channels: int
    """C of the targets."""
    context_channels: int
    """D of the contexts."""
    classes: int
    """Of the label that `objective.label` names; 0 where it names none."""
    shared: bool
    """Whether the contexts are the targets."""
    cells: int = 1
    """Vectors of each sample that is read whole, one for each cell that is compared; 1 for an objective of one's own."""
    rows_between: int = 0
    """Least rows between a context and its target: of pictures, so that no pixel is in both; of steps, `objective.gap`."""


C = TypeVar("C", bound=Contrastive)

Build = Callable[[ObjectiveOptions, Scored], Objective]


def _contrastive(kind: type[C], options: ObjectiveOptions, scored: Scored) -> C:
    return kind(
        scored.channels,
        scored.context_channels,
        options.steps,
        max(options.skip, scored.rows_between),
        options.negatives,
        options.anchors,
        options.projection or 0,
        scored.shared,
    )


def _ntxent(options: ObjectiveOptions, scored: Scored) -> NTXent:
    return NTXent(scored.context_channels, options.projection or 128, options.temperature, scored.cells)


def _both(options: ObjectiveOptions, scored: Scored) -> PositionsAndRenderings:
    # The cells are for the positions; renderings are compared by the mean over all of them.
    return PositionsAndRenderings(_contrastive(InfoNCE, options, scored), _ntxent(options, replace(scored, cells=1)))


_BUILD: dict[str, Build] = {
    "infonce": partial(_contrastive, InfoNCE),
    "hinge": partial(_contrastive, Hinge),
    "ntxent": _ntxent,
    "infonce+ntxent": _both,
    "supervised": lambda _, scored: Supervised(scored.context_channels, scored.classes),
}

_RENDERINGS = {"ntxent": 2, "infonce+ntxent": 2}

_PREDICTS = {"infonce", "hinge", "infonce+ntxent"}

_SEES_CELLS = _PREDICTS | {"ntxent"}


def register_objective(name: str, build: Build, renderings: int = 1) -> None:
    """Makes an objective known under a name of --objective. `build` is called with the options and what is scored.

    renderings: neighbouring windows of a batch that show the same sample, each in another view. Raises ConfigError where the
    name is taken.
    """
    if name in _BUILD:
        raise ConfigError(f"There is an objective {name!r} already; give yours another name.")
    _BUILD[name] = build
    _RENDERINGS[name] = renderings


def renderings_compared(name: str) -> int:
    """Neighbouring windows of a batch that show one sample in different views: 1 for most objectives."""
    return _RENDERINGS.get(name, 1)


def predicts_rows(name: str) -> bool:
    """Whether an objective predicts some rows of frames from others, so that one row is not enough."""
    return name in _PREDICTS


def sees_cells(name: str) -> bool:
    """Whether an objective scores the cells of a sample that is read whole; else it scores the mean over all of it."""
    return name in _SEES_CELLS


def check_objective(name: str) -> None:
    """Raises ConfigError where there is no objective of that name."""
    if name not in _BUILD:
        raise ConfigError(
            f"--objective {name}: there is none of that name; there are {', '.join(_BUILD)}.{did_you_mean(name, _BUILD)}"
        )


def build_objective(options: ObjectiveOptions, scored: Scored) -> ObjectiveModule:
    """The objective that the options name."""
    return cast(ObjectiveModule, _BUILD[options.name](options, scored))

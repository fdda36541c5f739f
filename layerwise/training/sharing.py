"""Whether the batches of a run may be shared by several ranks."""

from collections.abc import Sequence

from layerwise.errors import ConfigError
from layerwise.memory.ranks import Ranks
from layerwise.training.behaviour import behaviour
from layerwise.training.plan import StagePlan


def check_shareable(plans: Sequence[StagePlan], ranks: Ranks) -> None:
    """Raises ConfigError that names the first module whose samples act on each other, where there are several ranks."""
    for plan in plans if ranks.count > 1 else ():
        why = behaviour(plan).why_whole
        if why:
            raise ConfigError(
                f"Stage {plan.stage}: {why}, so {ranks.count} processes cannot share its batches; train it in one, without "
                "torchrun."
            )

"""Whether the batches of a stage may be sliced, and shared by several ranks."""

from collections.abc import Sequence

from layerwise.errors import ConfigError
from layerwise.memory.meter import uncounted
from layerwise.memory.ranks import Ranks
from layerwise.nets.batch_effects import BatchEffects, module_effects
from layerwise.training.spec import StageSpec


def batch_effects(spec: StageSpec) -> BatchEffects:
    """What the module of a stage does with a batch in training. Found in host memory, which no meter counts."""
    with uncounted():
        return module_effects(spec.network, spec.layers, spec.frame_shape)


def check_shareable(specs: Sequence[StageSpec], ranks: Ranks) -> None:
    """Raises ConfigError that names the first module whose samples act on each other, where there are several ranks."""
    for spec in specs if ranks.count > 1 else ():
        why = batch_effects(spec).why_unsliceable
        if why:
            raise ConfigError(
                f"Stage {spec.stage}: {why}, so {ranks.count} processes cannot share its batches; train it in one, without "
                "torchrun."
            )

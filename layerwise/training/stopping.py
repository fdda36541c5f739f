"""A stop that all ranks make at the same step, whichever of them was asked."""

from layerwise.memory.ranks import Ranks
from layerwise.stop import StopFlag


def asked_to_stop(stop: StopFlag, ranks: Ranks) -> bool:
    """Whether any rank was; the flag is then set on all of them. Each calls it as often as the others.

    What it answers counts, and not the flag: a signal that comes behind it waits for the next call.
    """
    if not ranks.any(stop.reason is not None):
        return False
    stop.reason = next(reason for reason in ranks.all(stop.reason) if reason)
    return True


def stop_together(stop: StopFlag, ranks: Ranks, where: str) -> None:
    """Raises Interrupted on all ranks where any was asked to stop. `where` ends the sentence."""
    if asked_to_stop(stop, ranks):
        stop.raise_if_set(where)

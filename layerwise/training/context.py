"""What work on a device needs, whatever it works on: the device, its meter, the ranks, the wish to stop, who is notified."""

from dataclasses import dataclass, field

import torch

from layerwise.events import Notify, silent
from layerwise.memory.host import HostMemory
from layerwise.memory.meter import AnyMeter
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.stop import StopFlag


@dataclass(frozen=True, slots=True)
class RunContext:
    """Passed to everything that computes on the device."""

    device: torch.device
    meter: AnyMeter
    """Counts the device bytes of the stage that is at work."""
    host: HostMemory = field(default_factory=HostMemory)
    """Host memory beside the device."""
    stop: StopFlag = field(default_factory=StopFlag)
    notify: Notify = silent
    ranks: Ranks = ALONE
    """The processes that do the same work together, each with its share of every batch."""

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop; the flag is then set on all of them. All ranks call it equally often.

        The answer counts, not the flag: a signal that comes after the answer waits for the next call.
        """
        if not self.ranks.any(self.stop.reason is not None):
            return False
        self.stop.reason = next(reason for reason in self.ranks.all_gather(self.stop.reason) if reason)
        return True

    def raise_if_stopped(self, where: str) -> None:
        """Raises Interrupted on all ranks where any of them was asked to stop. `where` ends the sentence."""
        if self.asked_to_stop():
            self.stop.raise_if_set(where)

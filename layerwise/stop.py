"""A wish to stop, that every loop polls: finish the step, save, raise Interrupted."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from layerwise.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@dataclass(slots=True)
class StopFlag:
    """Set by a signal, or by whoever holds it."""

    reason: str | None = None

    def raise_if_set(self, where: str) -> None:
        """Raises Interrupted; call it where everything is saved. `where` ends the sentence."""
        if self.reason:
            raise Interrupted(f"Stopped by {self.reason} {where}; start the same command again to go on.")


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C set the flag; the same signal a second time does what it did before."""
    flag = StopFlag()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def ask(number: int, frame: FrameType | None) -> None:
        flag.reason = signal.Signals(number).name
        signal.signal(number, before[number])

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield flag
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])

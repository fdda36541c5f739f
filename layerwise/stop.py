"""A wish to stop, that every loop polls: finish the step, save, raise Interrupted."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from layerwise.errors import Interrupted
from layerwise.units import seconds

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

LONGEST_MARGIN = 120
"""Seconds that are left of a time limit when the flag is set."""


@dataclass(slots=True)
class StopFlag:
    """Set by a signal, by the clock, or by whoever holds it."""

    reason: str | None = None

    def ask(self, reason: str) -> None:
        """Sets the flag; the first reason stands."""
        self.reason = self.reason or reason

    def raise_if_set(self, where: str = "") -> None:
        """Raises Interrupted; call it where everything is saved. where: says what was going on."""
        if self.reason:
            stopped = f"Stopped by {self.reason} {where}".rstrip()
            raise Interrupted(f"{stopped}; start the same command again to go on.")


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C set the flag; the same signal a second time does what it did before.

    Those that are ignored stay so: whoever started this process with nohup, or in the background of a script, has asked for it.
    A terminal that closes sends SIGHUP twice, itself and through the shell, so a second one is ignored.
    """
    flag = StopFlag()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    second_time = heeded | ({signal.SIGHUP: signal.SIG_IGN} if signal.SIGHUP in heeded else {})

    def ask(number: int, frame: FrameType | None) -> None:
        flag.reason = signal.Signals(number).name
        signal.signal(number, second_time[signal.Signals(number)])

    for number in heeded:
        signal.signal(number, ask)
    try:
        yield flag
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


def too_late_to_stop() -> None:
    """Everything is done: a signal that comes while the process ends must not make a failure of it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_in_time(flag: StopFlag, time: str | None) -> Iterator[None]:
    """Sets the flag before so much time (`2h`, `1:30:00`) is over: two minutes before, or a tenth where that is less.

    What is left is for the step in hand and for saving. Without a time nothing happens. Raises ValueError where the text is
    no time.
    """
    if time is None:
        yield
        return
    whole = seconds(time)
    until = min(whole - min(LONGEST_MARGIN, whole / 10), threading.TIMEOUT_MAX)
    timer = threading.Timer(until, flag.ask, (f"--time {time}",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

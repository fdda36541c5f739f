"""Promises that are checked one after another, each within its share of the time. What crashes or hangs takes no other along.

`in_turn` checks in this process; `apart` in another one, which is replaced where a check has failed in it or does not end.
"""

import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

GRACE = 30.0
"""Seconds that a check may go on when its share is over, before its process is killed."""

START = 120.0
"""Seconds that a process may take before it checks anything."""


class NotMeasured(Exception):
    """Why a promise could be neither kept nor broken here."""


@dataclass(slots=True)
class Findings:
    """What a check has seen so far; it may go on until `until`, as time.time() has it."""

    until: float = math.inf
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, holds: bool | None, **figures: Any) -> None:
        """holds: whether these figures keep the promise; None where they belong to none."""
        self.rows.append({**figures, "holds": holds})

    def raise_if_over(self) -> None:
        """Raises NotMeasured where the share of the time is over."""
        if time.time() > self.until:
            raise NotMeasured("its share of the time was over")


@dataclass(frozen=True, slots=True)
class Check:
    """One promise. `measure` is given what all checks share, and adds to the findings; what it raises breaks the promise."""

    name: str
    promise: str
    seconds: float
    """Its share, relative to the others'."""
    measure: Callable[[Any, Findings], None]


Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a promise."""

    name: str
    promise: str
    status: Status
    why: str = ""
    """Of a promise that is broken, or not checked to the end."""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    traceback: str = ""
    """Where a check crashed."""
    crashed: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def in_turn(
    checks: Sequence[Check], shared: Any, end: float, begin: Callable[[float], None] = lambda until: None
) -> Iterator[Outcome]:
    """Checks until `end`, as time.time() has it. What one leaves of its share the others have.

    begin: is told when the share of the next one is over.
    """
    for number, check in enumerate(checks):
        now = time.time()
        share = (end - now) * check.seconds / sum(each.seconds for each in checks[number:])
        begin(now + share)
        if share <= 0:
            yield Outcome(check.name, check.promise, "not run", "no time was left")
        else:
            yield _measured(check, shared, now + share)


def _measured(check: Check, shared: Any, until: float) -> Outcome:
    findings, started = Findings(until), time.time()
    status: Status = "passed"
    why, where, crashed = "", "", False
    try:
        check.measure(shared, findings)
    except NotMeasured as reason:
        status, why = "not run", str(reason)
    except Exception as error:
        status, why, where, crashed = "failed", _in_a_line(error), traceback.format_exc(), True
    judged = [row["holds"] for row in findings.rows if row["holds"] is not None]
    if not all(judged):
        broken = sum(not holds for holds in judged)
        status, why = "failed", why or f"not so in {broken} of {len(judged)} rows"
    elif status == "passed" and not judged:
        status, why = "not run", "there was nothing to judge by"
    seconds = round(time.time() - started, 1)
    return Outcome(check.name, check.promise, status, why, seconds, findings.rows, where, crashed)


def _in_a_line(error: Exception) -> str:
    """Of its traceback, without the advice that CUDA's errors end with."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def apart(checks: Sequence[Check], shared: Callable[[], Any], end: float) -> Iterator[Outcome]:
    """As `in_turn`, in a process of its own. shared: makes there what all checks share; like the checks, it is pickled."""
    spawning = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    left = list(checks)
    while left:
        if time.time() >= end:
            yield from in_turn(left, None, end)  # none of them is run
            return
        receiver, sender = spawning.Pipe(duplex=False)
        process = spawning.Process(target=_work, args=(left, shared, end, sender), daemon=True)
        process.start()
        sender.close()
        trusted = True
        while left and trusted:
            outcome = _awaited(left[0], process, receiver)
            trusted = not outcome.crashed
            del left[0]
            yield outcome
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()


def _work(checks: list[Check], shared: Callable[[], Any], end: float, sender: Connection) -> None:
    given = shared()
    for outcome in in_turn(checks, given, end, sender.send):
        sender.send(outcome)
        if outcome.crashed:  # who knows what the device is like now, and what still holds its memory
            return


def _awaited(check: Check, process: Any, receiver: Connection) -> Outcome:
    """What the process says of the check, or what became of the process."""

    def received(seconds: float) -> Any:
        if not receiver.poll(max(seconds, 0)):
            process.kill()
            raise TimeoutError
        return receiver.recv()

    started, status, why = time.time(), "failed", f"its process had not begun after {START:.0f} s, and was killed"
    try:
        until = received(START)
        status, why = "not run", f"it had not ended {GRACE:.0f} s after its share of the time was over, and was killed"
        return received(until + GRACE - time.time())
    except TimeoutError:
        pass
    except (EOFError, OSError):
        status = "failed"
        process.join()
        why = f"its process ended with exit code {process.exitcode}"
    return Outcome(check.name, check.promise, status, why, round(time.time() - started, 1), crashed=True)

"""Device memory over time, in stages/S/memory.jsonl: one line a second, and the first and last of each pass.

A line is appended and never changed. The file says how long things took, so it is not part of what a resumed run must
repeat bit by bit; what a retrained stage has left there is deleted with the rest of its folder."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.events import CachingProgress, EpochDone, Event, Notify, StageStarted, StepDone
from layerwise.files import open_to_append
from layerwise.memory.meter import AnyMeter

SECONDS_BETWEEN_LINES = 1.0


class MemoryLog:
    """A context manager for one stage; takes its events, notes what the device holds, and passes them on.

    Each line: "seconds" that the stage has been worked on, over all starts; "pass": training, held-out or caching, which has
    lasted since the line before; "live_bytes" at that moment; "peak_bytes": the highest of the training pass (held-out
    included) or of the caching pass so far. It is not the highest since the line before: on a CPU most steps are known from
    an earlier one of their size and are not metered again.
    """

    def __init__(
        self, path: Path, meter: AnyMeter, notify: Notify, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._meter, self._notify, self._clock = path, meter, notify, clock
        self._started = 0.0
        self._written: dict[str, Any] = {}
        self._waiting: dict[str, Any] = {}
        """The newest sample, where it has not been written."""

    def __enter__(self) -> "MemoryLog":
        self._started = self._clock()
        with contextlib.suppress(OSError, LayerwiseError, ValueError, TypeError, KeyError, IndexError):
            self._started -= float(_last_line(self._path)["seconds"])
        return self

    def __exit__(self, *error: object) -> None:
        self._write(self._waiting)

    def __call__(self, event: Event) -> None:
        match event:
            case StageStarted():
                self._add("training", self._meter.live, self._meter.peak)
            case StepDone():
                self._add("training", event.live_bytes, event.peak_bytes)
            case EpochDone():
                self._add("held-out", self._meter.live, event.peak_bytes)
            case CachingProgress():
                self._add("caching", event.live_bytes, event.peak_bytes)
        self._notify(event)

    def _add(self, name: str, live: int, peak: int) -> None:
        seconds = round(self._clock() - self._started, 3)
        sample = {"seconds": seconds, "pass": name, "live_bytes": live, "peak_bytes": peak}
        if name != self._written.get("pass"):
            self._write(self._waiting)
        elif seconds - self._written["seconds"] < SECONDS_BETWEEN_LINES:
            self._waiting = sample
            return
        self._write(sample)

    def _write(self, sample: dict[str, Any]) -> None:
        self._waiting = {}
        if sample:
            self._written = sample
            # A record decides nothing.
            with contextlib.suppress(OSError, LayerwiseError), open_to_append(self._path) as file:
                file.write(f"{json.dumps(sample)}\n".encode())


LONGEST_LINE = 4096
"""Bytes; the file itself may be of weeks."""


def _last_line(path: Path) -> dict[str, Any]:
    """Of a file whose last line a kill may have torn: that one is cut off, for the next one would be lost with it."""
    with open_to_append(path) as file:
        start = max(file.seek(0, os.SEEK_END) - LONGEST_LINE, 0)
        file.seek(start)
        end = file.read()
        whole = end[: end.rfind(b"\n") + 1]
        file.truncate(start + len(whole))
    line: dict[str, Any] = json.loads(whole.splitlines()[-1])
    return line

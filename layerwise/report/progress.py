"""Events of a run as they happen: a live table on a terminal, plain lines elsewhere and in the log file."""

import contextlib
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from layerwise.errors import LayerwiseError
from layerwise.events import (
    CachingProgress,
    EpochDone,
    Event,
    Message,
    Notify,
    RunStarted,
    StageDone,
    StageStarted,
    StepDone,
)
from layerwise.files import open_to_append
from layerwise.screen import printable
from layerwise.units import duration, percent, size


def line(event: Event) -> str | None:
    """One line, or None for events that would only fill a log."""
    match event:
        case Message(text):
            return text
        case StageStarted(stage, 0, 0):
            return f"stage {stage}: training"
        case StageStarted(stage, epoch, 0, round) if round > 1:
            return f"stage {stage}: training from epoch {epoch + 1}, round {round}"
        case StageStarted(stage, epoch, step):
            return f"stage {stage}: going on in epoch {epoch + 1}, after step {step}"
        case EpochDone():
            probed = "" if event.probe_error is None else f"probe error {percent(event.probe_error)}, "
            return (
                f"stage {event.stage}, epoch {event.epoch}: loss {event.loss:.4f}, held-out {event.held_out_loss:.4f}, "
                f"accuracy {event.held_out_accuracy:.3f}, {probed}device peak {size(event.peak_bytes)}, "
                f"{duration(event.seconds)}"
            )
        case StageDone():
            return (
                f"stage {event.stage}: {outcome(event.epochs, event.converged)}, best held-out loss "
                f"{event.best_loss:.4f}; device peak {size(event.train_peak_bytes)} training, "
                f"{size(event.cache_peak_bytes)} caching, {event.device_bytes_left} bytes left on it; "
                f"cache {size(event.cache_bytes)}; {duration(event.seconds)}"
            )
    return None


def outcome(epochs: int, converged: bool | None) -> str:
    """How the training of a stage ended, and after how many epochs."""
    return f"{'converged' if converged else 'reached max epochs'} ({epochs})"


class PlainLines:
    """Prints events as lines."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        text = line(event)
        if text is not None:
            self.write(text)

    def write(self, text: str) -> None:
        """One line."""
        print(printable(text), file=self._stream, flush=True)


class LogFile(PlainLines):
    """Appends events to a file, each line with its time. The file is opened for each line: lines are few."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, text: str) -> None:
        """One line; nothing where the folder is not (yet) a run directory, or takes no more: a log decides nothing."""
        with contextlib.suppress(OSError, LayerwiseError):
            if (self._path.parent / "run.json").exists():
                with open_to_append(self._path) as file:
                    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}\n"
                    file.write(line.encode(errors="backslashreplace"))


REFRESH_PER_SECOND = 4

BAR_COLUMNS = 30
"""Of the bar for all stages."""


@dataclass(slots=True)
class _Row:
    status: str = "pending"
    epoch: str = ""
    loss: str = ""
    held_out: str = ""
    accuracy: str = ""
    probe: str = ""
    """Its newest error, where there is one."""
    peak: str = ""
    left: str = ""
    part: float = 0.0
    """Of its epochs that are over; 1 where it is trained."""
    epoch_seconds: list[float] = field(default_factory=list)
    """Of each epoch since the stage was started."""
    epoch_started: float = 0.0
    """By time.monotonic."""


class LiveTable:
    """One row per stage, and a bar for all of them, redrawn in place.

    A context manager; takes events while it is open, the RunStarted first.
    """

    def __init__(self, console: Console) -> None:
        self._rows: dict[int, _Row] = {}
        self._max_epochs, self._rounds = 0, 1
        self._budget: int | None = None
        self._memory = ""
        self._started, self._part_before = time.monotonic(), 0.0
        # Cleared at the end: the summary, or the sentence of an error, takes its place.
        self._live = Live(console=console, refresh_per_second=REFRESH_PER_SECOND, transient=True)

    def __enter__(self) -> "LiveTable":
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(None, None, None)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Message):
            self._live.console.print(event.text)
            return
        if isinstance(event, RunStarted):
            self._max_epochs, self._rounds, self._budget = event.max_epochs, event.rounds, event.budget_bytes
            done = {stage: _Row("done before", part=1.0) for stage in event.done}
            self._rows = {stage: done.get(stage, _Row()) for stage in range(1, event.stages + 1)}
            self._started, self._part_before = time.monotonic(), self._part
            return
        row = self._rows[event.stage]
        match event:
            case StageStarted():
                row.status, row.epoch = "training", f"{event.epoch + 1}/{self._max_epochs}"
                row.epoch_seconds, row.epoch_started = [], time.monotonic()
                if event.epoch and not row.part:  # from a checkpoint: that took no time of this start
                    row.part = event.epoch / self._max_epochs
                    self._part_before += row.part / len(self._rows)
            case StepDone():
                row.epoch = f"{event.epoch + 1}/{self._max_epochs}"
                row.loss, row.accuracy = f"{event.loss:.4f}", f"{event.accuracy:.3f}"
                row.peak = size(event.peak_bytes)
                self._memory = self._against_budget(event.live_bytes, event.peak_bytes)
                over = (event.step + 1) / event.steps
                row.left, row.part = self._time_left(row, event.epoch, over), (event.epoch + over) / self._max_epochs
            case EpochDone():
                row.loss, row.held_out = f"{event.loss:.4f}", f"{event.held_out_loss:.4f}"
                row.accuracy = f"{event.held_out_accuracy:.3f}"
                if event.probe_error is not None:
                    row.probe = percent(event.probe_error)
                row.epoch_seconds.append(event.seconds)
                row.epoch_started = time.monotonic()
            case CachingProgress():
                row.status, row.left = f"caching {event.rows / max(event.total, 1):.0%}", ""
                self._memory = self._against_budget(event.live_bytes, event.peak_bytes)
            case StageDone():
                row.status = "converged" if event.converged else "max epochs"
                row.peak = size(max(event.train_peak_bytes, event.cache_peak_bytes))
                self._memory = self._against_budget(event.device_bytes_left, event.train_peak_bytes)
                row.left, row.held_out = "", f"{event.best_loss:.4f}"
                row.part = 1.0 if event.round == self._rounds else event.epochs / self._max_epochs
        self._live.update(self._render())

    def _against_budget(self, live: int, peak: int) -> str:
        budget = f", budget {size(self._budget)}" if self._budget else ""
        return f"device memory: {size(live)} now, peak {size(peak)}{budget}"

    def _time_left(self, row: _Row, epoch: int, part: float) -> str:
        """At most, at the pace of the last three epochs. part: of the epoch in hand that is over."""
        last = row.epoch_seconds[-3:]
        per_epoch = sum(last) / len(last) if last else (time.monotonic() - row.epoch_started) / part
        return f"< {duration(max(per_epoch * (self._max_epochs - epoch - part), 0))}"

    @property
    def _part(self) -> float:
        """Of the epochs of all stages that are over."""
        return sum(row.part for row in self._rows.values()) / len(self._rows)

    def _overall(self) -> Table:
        """A bar for all stages; the time left at most, at the pace since the start."""
        part, passed = self._part, time.monotonic() - self._started
        here = part - self._part_before
        left = f"< {duration(passed * (1 - part) / here)} left" if here > 0 and part < 1 else ""
        grid = Table.grid(padding=(0, 1))
        grid.add_row("all stages", ProgressBar(total=1.0, completed=part, width=BAR_COLUMNS), f"{part:.0%}", left)
        return grid

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold", caption_justify="left")
        table.caption = self._memory
        probed = any(row.probe for row in self._rows.values())
        probe = ("probe",) if probed else ()
        for name in ("stage", "status", "epoch", "loss", "held-out", "accuracy", *probe, "peak", "time left"):
            table.add_column(name, no_wrap=True)
        for stage, row in self._rows.items():
            style = "dim" if row.status == "pending" else None
            probe = (row.probe,) if probed else ()
            cells = (row.status, row.epoch, row.loss, row.held_out, row.accuracy, *probe, row.peak, row.left)
            table.add_row(str(stage), *cells, style=style)
        return Group(table, self._overall())


def display(console: Console) -> contextlib.AbstractContextManager[Notify]:
    """The live table on a terminal, and in a notebook that has widgets to redraw it; plain lines elsewhere."""
    redrawn = find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    return LiveTable(console) if redrawn else contextlib.nullcontext(PlainLines(console.file))

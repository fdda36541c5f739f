"""Events as plain lines: for log files, and for terminals that are none."""

import contextlib
import time
from pathlib import Path
from typing import TextIO

from layerwise.events import EpochDone, Event, Message, StageDone, StageStarted
from layerwise.units import duration, size


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
            return (
                f"stage {event.stage}, epoch {event.epoch}: loss {event.loss:.4f}, held-out {event.held_out_loss:.4f}, "
                f"accuracy {event.held_out_accuracy:.3f}, device peak {size(event.peak_bytes)}, {duration(event.seconds)}"
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

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._closed = stream, False

    def __call__(self, event: Event) -> None:
        text = line(event)
        if text is None or self._closed:
            return
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            self._closed = True  # whoever read along has gone; the training goes on


class LogFile:
    """Appends events to a file, each line with its time. The file is opened for each line: lines are few."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, event: Event) -> None:
        text = line(event)
        if text is not None:
            self.write(text)

    def write(self, text: str) -> None:
        """One line; nothing where the folder is not (yet) a run directory, or takes no more: a log decides nothing."""
        with contextlib.suppress(OSError):
            if (self._path.parent / "run.json").exists():
                with self._path.open("a") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

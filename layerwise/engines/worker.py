"""A process that performs tasks of a run that another one has prepared: `python -m layerwise.engines.worker DIR DEVICE`.

It reads tasks from its standard input, one a line, and answers on its standard output with JSON lines: events as they come,
then how the task ended. Where the input ends, so does the worker, after saving: it does not outlive whoever sent it tasks.
"""

import json
import os
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from layerwise import errors, events
from layerwise.engines.task_runner import open_prepared_run, perform_task
from layerwise.errors import LayerwiseError, RunError
from layerwise.events import Event
from layerwise.stop import StopFlag, stop_on_signals
from layerwise.training.schedule import Task

Answer = dict[str, Any]
DONE: Answer = {"ended": "done"}


def main(out: str, device: str) -> None:
    """Until the input ends."""
    output = _own_output()
    with stop_on_signals() as stop:
        lines: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=_listen, args=(sys.stdin, lines, stop), daemon=True).start()
        run = None
        while line := lines.get():
            try:
                run = run or open_prepared_run(Path(out), device)
                perform_task(Task(*json.loads(line)), run, stop, lambda event: _tell(output, event_message(event)))
                _tell(output, DONE)
            except LayerwiseError as error:
                _tell(output, error_message(error))


def _own_output() -> TextIO:
    """The standard output, which from here on is this worker's alone: what libraries print goes to the log with the errors."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own


def _tell(output: TextIO, message: Answer) -> None:
    with suppress(BrokenPipeError):  # whoever sent the task is gone, and the task is about to save
        print(json.dumps(message), file=output, flush=True)


def _listen(stream: TextIO, lines: "SimpleQueue[str]", stop: StopFlag) -> None:
    for line in stream:
        lines.put(line)
    stop.ask("the process that sent it tasks")
    lines.put("")


def event_message(event: Event) -> Answer:
    """An event as JSON has it."""
    return {"event": type(event).__name__, **asdict(event)}


def event_of(message: Answer) -> Event:
    """The event of a message."""
    values = {name: value for name, value in message.items() if name != "event"}
    return getattr(events, message["event"])(**values)


def error_message(error: LayerwiseError) -> Answer:
    """How a task ended that was stopped, or that cannot be done however often it is tried."""
    return {"ended": type(error).__name__, "sentence": str(error)}


def error_of(message: Answer) -> LayerwiseError:
    """The error of a message."""
    kind = getattr(errors, message["ended"])
    return kind(message["sentence"]) if not issubclass(kind, errors.UnusableCache) else RunError(message["sentence"])


if __name__ == "__main__":
    main(*sys.argv[1:])

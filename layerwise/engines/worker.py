"""Performs tasks of a run that another process has prepared: `python -m layerwise.engines.worker DIR FUNCTIONS DEVICE FD`.

FUNCTIONS are those that the run may call, as JSON: `config.named_functions`. It reads tasks from its standard input, one a
line, and writes pickles to the file descriptor FD: events as they come, then how the task ended. Where the input ends, so does
the worker, after saving: it does not outlive whoever sent it tasks.
"""

import json
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TextIO

from layerwise.engines.task_runner import open_prepared_run, perform_task
from layerwise.errors import LayerwiseError
from layerwise.events import Event
from layerwise.screen import standard_streams_may_fail
from layerwise.stop import StopFlag, stop_on_signals
from layerwise.training.schedule import Task

Answer = LayerwiseError | None
"""How a task ended: what stopped it, or keeps it from being done however often it is tried; None where it is done."""


def main(out: str, functions: str, device: str, descriptor: str) -> None:
    """Until the input ends."""
    with (
        standard_streams_may_fail(),
        stop_on_signals() as stop,
        Connection(int(descriptor), readable=False) as output,
    ):
        lines: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=_listen, args=(sys.stdin, lines, stop), daemon=True).start()
        run = None
        while line := lines.get():
            try:
                run = run or open_prepared_run(Path(out), json.loads(functions), device)
                perform_task(Task(*json.loads(line)), run, stop, lambda event: _tell(output, event))
                _tell(output, None)
            except LayerwiseError as error:
                _tell(output, error)


def _tell(output: Connection, message: Event | Answer) -> None:
    with suppress(BrokenPipeError):  # whoever sent the task is gone, and the task is about to save
        output.send(message)


def _listen(stream: TextIO, lines: "SimpleQueue[str]", stop: StopFlag) -> None:
    for line in stream:
        lines.put(line)
    stop.ask("the process that sent it tasks")
    lines.put("")


if __name__ == "__main__":
    main(*sys.argv[1:])

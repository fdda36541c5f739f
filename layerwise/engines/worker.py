"""Performs tasks of a run that another process has prepared: `python -m layerwise.engines.worker DIR FUNCTIONS DEVICE FD`.

FUNCTIONS are those that the run may call, as JSON: `config.named_functions`. The file descriptor FD is a connection: tasks come
from it, events go back as they come, then how the task ended. Where it ends, or gives None, the worker saves and ends: it does
not outlive whoever sent it tasks.
"""

import json
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from layerwise.engines.task_runner import open_prepared_run, perform_task
from layerwise.errors import LayerwiseError
from layerwise.events import Event
from layerwise.screen import standard_streams_may_fail
from layerwise.stop import StopFlag, stop_on_signals
from layerwise.training.schedule import Task

Answer = LayerwiseError | None
"""How a task ended: what stopped it, or keeps it from being done however often it is tried; None where it is done."""


def main(out: str, functions: str, device: str, descriptor: str) -> None:
    """Until no more tasks come."""
    with standard_streams_may_fail(), stop_on_signals() as stop, Connection(int(descriptor)) as connection:
        tasks: SimpleQueue[Task | None] = SimpleQueue()
        threading.Thread(target=_listen, args=(connection, tasks, stop), daemon=True).start()
        run = None
        while task := tasks.get():
            try:
                run = run or open_prepared_run(Path(out), json.loads(functions), device)
                perform_task(task, run, stop, lambda event: _tell(connection, event))
                _tell(connection, None)
            except LayerwiseError as error:
                _tell(connection, error)


def _tell(connection: Connection, message: Event | Answer) -> None:
    with suppress(ConnectionError):  # whoever sent the task is gone, and the task is about to save
        connection.send(message)


def _listen(connection: Connection, tasks: "SimpleQueue[Task | None]", stop: StopFlag) -> None:
    try:
        with suppress(EOFError, OSError):  # whoever sent tasks has ended
            while task := connection.recv():
                tasks.put(task)
    finally:
        stop.ask("the process that sent it tasks")
        tasks.put(None)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Performs the tasks of a run in worker processes on this machine, one for each device.

A worker that dies is replaced, and its task goes on from its last checkpoint; a task whose workers die three times ends the
run, with the end of the last one's log.
"""

import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

from layerwise.config import named_functions
from layerwise.engines.worker import Answer
from layerwise.errors import Interrupted, LayerwiseError, RunError
from layerwise.events import Event, Message, Notify
from layerwise.files import open_to_append
from layerwise.importing import python_module
from layerwise.stop import StopFlag
from layerwise.training.run import Run
from layerwise.training.schedule import Task, ready

POLL_SECONDS = 0.2
ATTEMPTS = 3

PATIENCE_SECONDS = 600
"""How long workers may take to save once they were asked to stop."""

LOG_LINES = 15


@dataclass(slots=True)
class _Worker:
    device: str
    process: subprocess.Popen[str]
    output: Connection
    log: Path
    task: Task | None = None


Inbox = SimpleQueue[tuple[_Worker, Event | Answer | EOFError]]
"""What workers tell; EOFError once one has ended."""


def execute(tasks: Sequence[Task], run: Run, devices: Sequence[str], stop: StopFlag, notify: Notify) -> None:
    """Every task as soon as its needs are met and a worker is free.

    Raises Interrupted after all workers have saved, RunError where a task's workers have died three times, and what a task
    raises that cannot be done.
    """
    waiting, deaths, inbox = list(tasks), Counter[Task | None](), Inbox()
    logs = run.store.workers
    logs.mkdir(exist_ok=True)
    workers = [_start(device, logs / f"{number}.txt", run, inbox) for number, device in enumerate(devices)]
    try:
        while undone := {*waiting, *(worker.task for worker in workers if worker.task)}:
            stop.raise_if_set()
            _hand_out(waiting, undone, workers)
            try:
                worker, message = inbox.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if worker not in workers:
                continue  # a worker that was replaced has nothing more to say
            if message is None:
                worker.task = None
            elif isinstance(message, LayerwiseError):
                raise message
            elif isinstance(message, EOFError):
                if worker.task:
                    waiting.insert(0, worker.task)
                deaths[worker.task] += 1
                workers[workers.index(worker)] = _replacement(worker, deaths[worker.task], run, inbox, notify)
            else:
                notify(message)
    except Interrupted as interrupted:
        reason = stop.reason or f"a worker ({interrupted})"
        raise Interrupted(f"Stopped by {reason}; start the same command again to go on.") from None
    finally:
        _end(workers, inbox, notify)


def _hand_out(waiting: list[Task], undone: set[Task], workers: Sequence[_Worker]) -> None:
    """waiting: neither done nor in hand, in the order of the schedule."""
    for worker in workers:
        task = ready(waiting, undone)
        if worker.task is None and task is not None:
            waiting.remove(task)
            worker.task = task
            assert worker.process.stdin is not None
            with suppress(OSError):  # it has died, which the inbox will say
                print(json.dumps([task.round, task.stage]), file=worker.process.stdin, flush=True)


def _start(device: str, log: Path, run: Run, inbox: Inbox) -> _Worker:
    output, workers_end = Pipe(duplex=False)
    descriptor = workers_end.fileno()
    functions = json.dumps(named_functions(run.config))
    command = [*python_module("layerwise.engines.worker"), str(run.store.out), functions, device, str(descriptor)]
    # The last bits of sums on a CPU depend on the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONIOENCODING": "utf-8"}
    with open_to_append(log) as printed, workers_end:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            pass_fds=[descriptor],
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which tells them
        )
    worker = _Worker(device, process, output, log)
    threading.Thread(target=_listen, args=(worker, inbox), daemon=True).start()
    return worker


def _listen(worker: _Worker, inbox: Inbox) -> None:
    try:
        with worker.output, suppress(EOFError, OSError):  # it has ended, perhaps within a message
            while True:
                inbox.put((worker, worker.output.recv()))
    finally:  # whatever it has sent: a run that is not told of its end would wait for it for ever
        worker.process.wait()
        inbox.put((worker, EOFError()))


def _replacement(worker: _Worker, deaths: int, run: Run, inbox: Inbox, notify: Notify) -> _Worker:
    """Another worker in the place of one that has died. Raises RunError where its task has had enough of them."""
    code, task = worker.process.returncode, worker.task
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    if deaths >= ATTEMPTS:
        what = f"Stage {task.stage} in round {task.round}" if task else "A worker without a task"
        log = "\n".join(worker.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        raise RunError(
            f"{what} has failed {ATTEMPTS} times; the last worker {how}. The same command goes on once that is mended. "
            f"The end of its log, {worker.log}:\n{log}"
        )
    notify(Message(f"the worker on {worker.device} {how}; another takes its place"))
    return _start(worker.device, worker.log, run, inbox)


def _end(workers: list[_Worker], inbox: Inbox, notify: Notify) -> None:
    """Every worker saves and ends, as its input does; what they still tell is passed on."""
    for worker in workers:
        assert worker.process.stdin is not None
        with suppress(OSError):  # it has died
            worker.process.stdin.close()
    running = [worker for worker in workers if worker.process.poll() is None]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while running:
        try:
            worker, message = inbox.get(timeout=max(deadline - time.monotonic(), 0.01))
        except Empty:
            for worker in running:
                worker.process.kill()
            break
        if isinstance(message, EOFError):
            running = [each for each in running if each is not worker]
        elif message is not None and not isinstance(message, LayerwiseError):
            notify(message)
    workers.clear()

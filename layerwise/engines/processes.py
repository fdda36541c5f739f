"""Performs the tasks of a run in worker processes on this machine, one for each device.

A worker that dies is replaced, and its task goes on from its last checkpoint; a task whose workers die three times ends the
run, with the end of the last one's log.
"""

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

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
    process: subprocess.Popen[bytes]
    connection: Connection
    """Takes tasks; gives events, and how each task ended."""
    log: Path
    task: Task | None = None


def execute(tasks: Sequence[Task], run: Run, devices: Sequence[str], stop: StopFlag, notify: Notify) -> None:
    """Every task as soon as its needs are met and a worker is free.

    Raises Interrupted after all workers have saved, RunError where a task's workers have died three times, and what a task
    raises that cannot be done.
    """
    waiting, deaths = list(tasks), Counter[Task | None]()
    logs = run.store.workers
    logs.mkdir(exist_ok=True)
    workers = [_start(device, logs / f"{number}.txt", run) for number, device in enumerate(devices)]
    try:
        while undone := {*waiting, *(worker.task for worker in workers if worker.task)}:
            stop.raise_if_set()
            _hand_out(waiting, undone, workers)
            for worker, message in _messages(workers):
                if message is None:
                    worker.task = None
                elif isinstance(message, LayerwiseError):
                    raise message
                elif isinstance(message, EOFError):
                    if worker.task:
                        waiting.insert(0, worker.task)
                    deaths[worker.task] += 1
                    workers[workers.index(worker)] = _replacement(worker, deaths[worker.task], run, notify)
                else:
                    notify(message)
    except Interrupted as interrupted:
        reason = stop.reason or f"a worker ({interrupted})"
        raise Interrupted(f"Stopped by {reason}; start the same command again to go on.") from None
    finally:
        _end(workers, notify)


def _hand_out(waiting: list[Task], undone: set[Task], workers: Sequence[_Worker]) -> None:
    """waiting: neither done nor in hand, in the order of the schedule."""
    for worker in workers:
        task = ready(waiting, undone)
        if worker.task is None and task is not None:
            waiting.remove(task)
            worker.task = task
            with suppress(OSError):  # it has died, which its next message will say
                worker.connection.send(task)


def _messages(workers: Sequence[_Worker]) -> Iterator[tuple[_Worker, Event | Answer | EOFError]]:
    """What workers tell within POLL_SECONDS, one message of each; EOFError of one that has ended."""
    telling = wait([worker.connection for worker in workers], POLL_SECONDS)
    for worker in [worker for worker in workers if worker.connection in telling]:
        try:
            message = worker.connection.recv()
        except Exception:  # it has ended, perhaps within a message; or what it sent cannot be read
            message = EOFError()
        yield worker, message


def _start(device: str, log: Path, run: Run) -> _Worker:
    connection, workers_end = Pipe()
    descriptor = workers_end.fileno()
    functions = json.dumps(named_functions(run.config))
    command = [*python_module("layerwise.engines.worker"), str(run.store.out), functions, device, str(descriptor)]
    # The last bits of sums on a CPU depend on the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONIOENCODING": "utf-8"}
    with open_to_append(log) as printed, workers_end:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            pass_fds=[descriptor],
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which tells them
        )
    return _Worker(device, process, connection, log)


def _replacement(worker: _Worker, deaths: int, run: Run, notify: Notify) -> _Worker:
    """Another worker in the place of one that has died. Raises RunError where its task has had enough of them."""
    code, task = _end_of(worker), worker.task
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    if deaths >= ATTEMPTS:
        what = f"Stage {task.stage} in round {task.round}" if task else "A worker without a task"
        log = "\n".join(worker.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        raise RunError(
            f"{what} has failed {ATTEMPTS} times; the last worker {how}. The same command goes on once that is mended. "
            f"The end of its log, {worker.log}:\n{log}"
        )
    notify(Message(f"the worker on {worker.device} {how}; another takes its place"))
    return _start(worker.device, worker.log, run)


def _end_of(worker: _Worker) -> int:
    """The exit code of a worker whose connection has ended; what it does after that is not waited for long."""
    try:
        return worker.process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        worker.process.kill()
        return worker.process.wait()


def _end(workers: Sequence[_Worker], notify: Notify) -> None:
    """Every worker saves and ends; what they still tell is passed on."""
    for worker in workers:
        with suppress(OSError):  # it has died
            worker.connection.send(None)
    running, deadline = list(workers), time.monotonic() + PATIENCE_SECONDS
    while running and time.monotonic() < deadline:
        for worker, message in _messages(running):
            if isinstance(message, EOFError):
                running.remove(worker)
            elif message is not None and not isinstance(message, LayerwiseError):
                notify(message)
    for worker in workers:
        try:
            worker.process.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            worker.process.kill()

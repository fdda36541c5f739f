"""Performs the tasks of a run in worker processes on this machine, one for each device.

A worker that dies is replaced, and its task goes on from its last checkpoint; a task whose workers die three times ends the
run, with the end of the last one's log.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

from layerwise.engines.worker import DONE, Answer, error_of, event_of
from layerwise.errors import Interrupted, RunError
from layerwise.events import Message, Notify
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
    log: Path
    task: Task | None = None


Inbox = SimpleQueue[tuple[_Worker, Answer | None]]
"""What workers tell; None once one has ended."""


@dataclass(slots=True)
class _Work:
    """What is left of a run, and who is at it."""

    waiting: list[Task]
    """Neither done nor in hand, in the order of the schedule."""
    undone: set[Task]
    deaths: Counter[Task | None] = field(default_factory=Counter)


def execute(tasks: Sequence[Task], run: Run, devices: Sequence[str], stop: StopFlag, notify: Notify) -> None:
    """Every task as soon as its needs are met and a worker is free.

    Raises Interrupted after all workers have saved, RunError where a task's workers have died three times, and what a task
    raises that cannot be done.
    """
    work, inbox = _Work(list(tasks), set(tasks)), Inbox()
    workers = [_start(device, number, run, inbox) for number, device in enumerate(devices)]
    try:
        while work.undone:
            stop.raise_if_set()
            _hand_out(work, workers)
            try:
                worker, message = inbox.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if worker not in workers:
                continue  # a worker that was replaced has nothing more to say
            if message is None:
                _replace(worker, work, workers, run, inbox, notify)
            elif "event" in message:
                notify(event_of(message))
            elif message == DONE:
                work.undone.discard(worker.task)
                worker.task = None
            else:
                raise error_of(message)
    except Interrupted as interrupted:
        reason = stop.reason or f"a worker ({interrupted})"
        raise Interrupted(f"Stopped by {reason}; start the same command again to go on.") from None
    finally:
        _end(workers, inbox, notify)


def _hand_out(work: _Work, workers: Sequence[_Worker]) -> None:
    for worker in workers:
        task = ready(work.waiting, work.undone)
        if worker.task is None and task is not None:
            work.waiting.remove(task)
            worker.task = task
            _send(worker, json.dumps([task.round, task.stage]))


def _start(device: str, number: int, run: Run, inbox: Inbox) -> _Worker:
    log = run.store.out / "workers" / f"{number}.txt"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "layerwise.engines.worker", str(run.store.out), device]
    # The last bits of sums on a CPU depend on the number of threads.
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with log.open("a") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=threads,
            start_new_session=True,  # Ctrl-C is for this process, which tells them
        )
    worker = _Worker(device, process, log)
    threading.Thread(target=_listen, args=(worker, inbox), daemon=True).start()
    return worker


def _listen(worker: _Worker, inbox: Inbox) -> None:
    assert worker.process.stdout is not None
    try:
        for line in worker.process.stdout:
            with suppress(ValueError):  # torn by a kill, or printed by a library before the worker could prevent it
                inbox.put((worker, json.loads(line)))
    finally:
        worker.process.wait()
        inbox.put((worker, None))


def _send(worker: _Worker, line: str) -> None:
    assert worker.process.stdin is not None
    with suppress(OSError):  # it has died, which the inbox will say
        worker.process.stdin.write(line + "\n")
        worker.process.stdin.flush()


def _replace(worker: _Worker, work: _Work, workers: list[_Worker], run: Run, inbox: Inbox, notify: Notify) -> None:
    """Another worker in the place of one that has died. Raises RunError where its task has had enough of them."""
    code, task = worker.process.returncode, worker.task
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    work.deaths[task] += 1
    if task is not None:
        work.waiting.insert(0, task)
    if work.deaths[task] >= ATTEMPTS:
        log = "\n".join(worker.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        what = f"Stage {task.stage} in round {task.round}" if task else "A worker without a task"
        raise RunError(
            f"{what} has failed {ATTEMPTS} times; the last worker {how}. The same command goes on once that is mended. "
            f"The end of its log, {worker.log}:\n{log}"
        )
    notify(Message(f"the worker on {worker.device} {how}; another takes its place"))
    number = workers.index(worker)
    workers[number] = _start(worker.device, number, run, inbox)


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
        if message is None:
            running = [each for each in running if each is not worker]
        elif "event" in message:
            notify(event_of(message))
    workers.clear()

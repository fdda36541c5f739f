"""Performs the tasks of a run on the workers of a Dask cluster, which must see the run directory, the caches and the data.

A worker performs one task at a time. Where one dies, Dask gives its task to another, which goes on from the last checkpoint.
"""

import contextlib
import pickle
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from layerwise.config import named_functions
from layerwise.engines.task_runner import open_prepared_run, perform_task
from layerwise.engines.worker import Answer
from layerwise.errors import ConfigError, Interrupted, LayerwiseError, RunError
from layerwise.events import CachingProgress, Event, Message, Notify, StageStarted, StepDone
from layerwise.importing import children_search_no_folder
from layerwise.stop import StopFlag
from layerwise.training.run import Run
from layerwise.training.schedule import Task

if TYPE_CHECKING:
    from distributed import Client, Future, Variable

ANSWER_SECONDS = 10
"""How long a scheduler may take to answer."""

POLL_SECONDS = 0.2
ATTEMPTS = 3
LOG_LINES = 15

PULSE_SECONDS = 5.0
"""How often whoever started the run says that it is there."""

LOST_SECONDS = 60.0
"""After how long without a word a task saves and ends, so that another start can go on."""


@dataclass(frozen=True, slots=True)
class _Order:
    """What a worker must know to perform a task."""

    out: str
    topic: str
    """Names this start of the run, and where its processes meet: what an earlier start has opened may be out of date."""
    threads: int
    """Of each worker: on a CPU the last bits of sums depend on it."""
    functions: tuple[tuple[str, str], ...]
    """Those that the run may call, see `config.named_functions`."""
    devices: tuple[str, ...]
    """Of workers named 0, 1, …; where it is empty, each takes the one of the options."""


def execute(tasks: Sequence[Task], run: Run, stop: StopFlag, notify: Notify) -> None:
    """Every task, on the cluster of `--scheduler`, or on one of this machine with a worker for each of `--devices`.

    Raises ConfigError where there is no such cluster, Interrupted after all workers have saved, RunError where a task's
    workers have died three times, and what a task raises that cannot be done.
    """
    options = run.config.engine
    own = () if options.scheduler else options.devices or (str(run.device),)
    functions = tuple(named_functions(run.config).items())
    topic, threads = f"layerwise-{uuid.uuid4().hex}", torch.get_num_threads()
    order = _Order(str(run.store.out.resolve()), topic, threads, functions, own)
    with _client(options.scheduler, len(own)) as client:
        from distributed import Event as Signal
        from distributed import Variable

        told: SimpleQueue[Event] = SimpleQueue()
        client.subscribe_topic(order.topic, lambda event: told.put(pickle.loads(event[1]["told"])))
        halt, pulse = Signal(order.topic, client=client), Variable(order.topic, client=client)
        pulse.set(0)
        resources = {"GPU": 1} if options.scheduler and _offers_gpus(client, notify) else None
        futures: dict[Task, Future] = {}
        for task in tasks:
            needed = [futures[need] for need in task.needs if need in futures]
            name = f"{order.topic}-round-{task.round}-stage-{task.stage}"
            futures[task] = client.submit(
                _perform, order, task, needed, key=name, retries=ATTEMPTS - 1, pure=False, resources=resources
            )
        try:
            _follow(futures, client, told, pulse, stop, notify)
        finally:
            if any(not future.done() for future in futures.values()):
                halt.set()  # tasks in hand save, and those behind them see the signal at once
                while any(not future.done() for future in futures.values()):
                    _pass_on(told, notify)
                    time.sleep(POLL_SECONDS)


def _offers_gpus(client: "Client", notify: Notify) -> bool:
    """Whether workers were started with `--resources GPU=1`."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if not workers:
        notify(Message("no worker has joined the Dask scheduler yet; waiting for one"))
    return any("GPU" in (worker.get("resources") or {}) for worker in workers)


def _follow(
    futures: dict[Task, "Future"],
    client: "Client",
    told: "SimpleQueue[Event]",
    pulse: "Variable",
    stop: StopFlag,
    notify: Notify,
) -> None:
    undone, felt = dict(futures), time.monotonic()
    starts: Counter[Task] = Counter()

    def tell(event: Event) -> None:
        if isinstance(event, StageStarted):
            starts[Task(event.round, event.stage)] += 1
        notify(event)

    while undone:
        if time.monotonic() - felt > PULSE_SECONDS:
            felt = time.monotonic()
            pulse.set(felt)
        _pass_on(told, tell)
        for task, count in starts.items():
            if count > ATTEMPTS:  # a scheduler that was started elsewhere may allow more deaths than we do
                raise RunError(_failed(task, f"The end of the scheduler's log:\n{_scheduler_log(client)}"))
        stop.raise_if_set()
        for task in [task for task, future in undone.items() if future.done()]:
            _check(task, undone.pop(task), client)
        time.sleep(POLL_SECONDS)
    _pass_on(told, notify)


def _failed(task: Task, log: str) -> str:
    return (
        f"Stage {task.stage} in round {task.round} has failed {ATTEMPTS} times. The same command goes on once that is mended. "
        f"{log}"
    )


def _scheduler_log(client: "Client") -> str:
    return "\n".join(line for _, line in reversed(client.get_scheduler_logs(n=LOG_LINES)))


def _check(task: Task, future: "Future", client: "Client") -> None:
    """Raises what has kept the task from being done."""
    if future.status in ("cancelled", "lost"):
        raise RunError("The Dask scheduler is gone; start it again, and then the same command.")
    if future.status != "finished":
        raise RunError(_failed(task, _end_of_log(future, client)))
    if error := future.result():
        raise error


def _end_of_log(future: "Future", client: "Client") -> str:
    """The last lines that say why a task has failed; of a worker that died only the scheduler can tell."""
    from distributed import KilledWorker

    error = future.exception()
    if isinstance(error, KilledWorker):
        last = error.last_worker.address
        return f"Its last worker was {last}; the end of the scheduler's log:\n{_scheduler_log(client)}"
    lines = "".join(traceback.format_exception(type(error), error, future.traceback())).splitlines()
    return "\n".join(["The end of the last worker's log:", *lines[-LOG_LINES:]])


def _pass_on(told: "SimpleQueue[Event]", notify: Notify) -> None:
    with contextlib.suppress(Empty):
        while True:
            notify(told.get_nowait())


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int) -> "Iterator[Client]":
    try:
        import distributed
    except ImportError as error:
        raise ConfigError(
            f"--engine dask: the package for it is missing ({error}); pip install 'layerwise[dask]'."
        ) from None
    import dask

    # A worker that dies is no fault of the task's until it has happened three times.
    settings = {"distributed.scheduler.allowed-failures": ATTEMPTS - 1, "distributed.worker.daemon": True}
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        if scheduler is None:
            stack.enter_context(children_search_no_folder())
            cluster = distributed.LocalCluster(
                n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None, silence_logs=50
            )
            address: Any = stack.enter_context(cluster)
        else:
            address = scheduler
        try:
            client = distributed.Client(address, timeout=ANSWER_SECONDS)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error}).") from None
        yield stack.enter_context(client)


_one_at_a_time = threading.Lock()
"""A worker's device belongs to one task, whatever the number of its threads."""


def _perform(order: _Order, task: Task, needed: list[Answer]) -> Answer:
    """On a worker: how the task has ended. Raises what is a defect, or may go better at another try."""
    from distributed import Event as Signal
    from distributed import Variable, get_client, get_worker

    worker, stop = get_worker(), StopFlag()
    if any(needed):
        return Interrupted("What it needs was not done.")
    client, done = get_client(), threading.Event()  # only the thread of a task can find the client
    halt, pulse = Signal(order.topic, client=client), Variable(order.topic, client=client)

    def listen() -> None:
        value, felt = None, time.monotonic()
        while not done.is_set():
            with contextlib.suppress(OSError, TimeoutError):  # a busy scheduler; one that is gone is lost below
                if halt.wait(timeout=1):
                    stop.reason = "whoever started it"
                    return
                if (newest := pulse.get(timeout=10)) != value:
                    value, felt = newest, time.monotonic()
            if time.monotonic() - felt > LOST_SECONDS:
                stop.reason = "the loss of whoever started it"
                return

    def tell(event: Event) -> None:
        if not isinstance(event, StepDone | CachingProgress):
            worker.log_event(order.topic, {"told": pickle.dumps(event)})  # Dask adds to the dict

    with _one_at_a_time:
        threading.Thread(target=listen, daemon=True).start()
        torch.set_num_threads(order.threads)
        try:
            device = order.devices[int(worker.name)] if order.devices else None
            perform_task(task, _run(order, device), stop, tell)
        except LayerwiseError as error:
            return error
        finally:
            done.set()
    return None


@lru_cache(maxsize=1)
def _run(order: _Order, device: str | None) -> Run:
    return open_prepared_run(Path(order.out), dict(order.functions), device)

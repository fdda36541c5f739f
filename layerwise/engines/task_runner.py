"""Performs one task of a run under its lock, in whichever process; opens a run that another process has prepared.

What is done is read from the disk before each task, so processes pass nothing of it to each other.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from layerwise.config import load, with_options
from layerwise.data.open import open_data
from layerwise.errors import RunError
from layerwise.events import Notify
from layerwise.files import exclusive
from layerwise.memory.device import find_device, share_one_heap
from layerwise.memory.meter import meter_for
from layerwise.nets import shortest_sample
from layerwise.run_store import RunState, RunStore
from layerwise.stop import StopFlag
from layerwise.training.budget import fit_to_budget
from layerwise.training.cache_plan import CachePlan
from layerwise.training.context import RunContext
from layerwise.training.cut import cut_network
from layerwise.training.encoder import stitch
from layerwise.training.resume import is_trained
from layerwise.training.run import Round, Run
from layerwise.training.samples import split_samples
from layerwise.training.schedule import Task
from layerwise.training.task import perform

HANDOVER_SECONDS = 120
"""How long a task waits for another process to let go of its round: one that was killed may still be on its way out,
and over a network a lock outlives a machine by a minute or two."""


def perform_tasks(tasks: Sequence[Task], run: Run, stop: StopFlag, notify: Notify) -> None:
    """Performs tasks in the order given, in which each comes behind those that it needs."""
    for task in tasks:
        perform_task(task, run, stop, notify)


def perform_task(task: Task, run: Run, stop: StopFlag, notify: Notify) -> None:
    """Performs a task whose needs are met, or finds it done. Raises Interrupted after saving."""
    context = RunContext(run.device, meter_for(run.device, None), stop, notify, run.ranks)
    of_round = f" of round {task.round}" if run.rounds > 1 else ""
    where = f"before stage {task.stage}{of_round}"
    context.raise_if_stopped(where)
    lock = run.store.round(task.round, run.rounds).task_lock
    with _locked(lock, task, where, stop) if run.ranks.first else nullcontext():
        if run.ranks.first:  # for `layerwise status`
            lock.write_text(f"{socket.gethostname()}, process {os.getpid()}, {run.device}\n")
        round = run.round(task.round)
        _check_needs(task, round)
        run.ranks.barrier()  # all ranks have read the state before the first one changes it
        perform(task, round, context)


def write_encoder(run: Run) -> None:
    """Stitches the trained stages into encoder.safetensors; every task must be done."""
    with _locked(run.store.task_lock, Task(run.rounds, len(run.specs)), "", StopFlag()):
        stitch(run.config, run.store, run.specs, run.data)
        for store in (run.store.round(number, run.rounds) for number in range(1, run.rounds + 1)):
            if store.state.exists():
                state = RunState.load(store.state)
                state.from_stage = None
                state.save(store.state)


def open_prepared_run(out: Path, device: str | None = None) -> Run:
    """A run that another process has prepared. device: in place of the one in its options.

    Raises RunError where the run was given its network as an object, which no other process can know.
    """
    share_one_heap()
    config = load(out / "config.toml")
    if device is not None:
        config = with_options(config, {"training.device": device})
    main = RunState.load(out / "run.json")
    if main.network and ":" not in config.net.name:
        raise RunError(
            f"The network of {out} was given as an object, which only its own process knows; leave --devices and --engine out."
        )
    store, on = RunStore(out, Path(main.caches)), find_device(config.training.device)
    data = open_data(config.data, shortest_sample(config))
    if data.identity != main.data_identity:
        raise RunError(f"The data of {out} have changed since it was prepared; bring the old ones back.")
    furthest = RunState.load(store.furthest_round(config.training.rounds).state)
    cache_plan = CachePlan(tuple(bool(record.cached) for record in furthest.stages))
    specs = cut_network(config, data, on, None, main.cut)
    if specs[0].network.identity != main.network:
        raise RunError(
            f"--net {config.net.name} makes another network than {out} was prepared with: it has been changed, or its weights "
            "are drawn from another generator than torch's. Bring the old one back, or start anew with --overwrite."
        )
    done = {record.stage for record in main.stages if record.status == "done"}
    memory_plans = fit_to_budget(config, specs, cache_plan, on, done, StopFlag())
    return Run(config, store, data, split_samples(data, config), specs, memory_plans, cache_plan, on)


def _check_needs(task: Task, round: Round) -> None:
    """Raises RunError where the round before has not ended for the stage: a job that is out of date came too early."""
    if round.earlier is None or is_trained(round.state.record(task.stage)):
        return
    before = round.earlier.state.record(task.stage)
    if not is_trained(before):
        raise RunError(
            f"Stage {task.stage} of round {task.round} needs round {task.round - 1}, where that stage is {before.status}: the "
            "run has been changed since this task was handed out; start the run again."
        )


@contextmanager
def _locked(lock: Path, task: Task, where: str, stop: StopFlag) -> Iterator[None]:
    """Holds a round while a task of it is performed: within a round one task follows another.

    Raises RunError where another process keeps the lock, and Interrupted, which says where, while it waits.
    """
    busy = RunError(
        f"Another process is at work in round {task.round}, where stage {task.stage} comes next; wait for it, or stop it."
    )
    deadline = time.monotonic() + HANDOVER_SECONDS
    while True:
        stop.raise_if_set(where)
        held = exclusive(lock, busy)
        try:
            held.__enter__()
            break
        except RunError as error:
            if error is not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    try:
        yield
    finally:
        held.__exit__(None, None, None)

"""A run as a process holds it that performs tasks of it: the data, the stages, how they are laid out and stored.

A process that joins a run later opens the same from the run directory. What is done is read from the disk before each task,
so that nothing of it is passed between processes."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from layerwise.config import Config, load, with_options
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.errors import RunError
from layerwise.events import Notify
from layerwise.files import exclusive
from layerwise.memory.device import find_device, share_one_heap
from layerwise.memory.plan import MemoryPlan
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.nets import shortest_sample
from layerwise.run_store import RunPaths, RunState
from layerwise.stop import StopFlag
from layerwise.training.budget import fit_to_budget
from layerwise.training.cache_plan import CachePlan
from layerwise.training.cut import cut_network
from layerwise.training.encoder import stitch
from layerwise.training.resume import is_trained
from layerwise.training.run import Run
from layerwise.training.samples import split_samples
from layerwise.training.schedule import Task, stop_together
from layerwise.training.spec import StageSpec
from layerwise.training.task import perform

HANDOVER_SECONDS = 120
"""How long a task waits for another process to let go of its round: one that was killed may still be on its way out,
and over a network a lock outlives a machine by a minute or two."""


@dataclass(frozen=True, slots=True)
class TaskRunner:
    """What is the same for all rounds."""

    config: Config
    paths: RunPaths
    data: DataSet
    split: np.ndarray
    """uint8 [N], see training.split."""
    specs: list[StageSpec]
    memory_plans: list[MemoryPlan]
    storage: CachePlan
    device: torch.device
    ranks: Ranks = ALONE
    """Who performs its tasks together; the first one holds the locks."""

    def perform(self, task: Task, stop: StopFlag, notify: Notify) -> None:
        """Performs a task whose needs are met, or finds it done. Raises Interrupted after saving."""
        of_round = f" of round {task.round}" if self.config.training.rounds > 1 else ""
        where = f"before stage {task.stage}{of_round}"
        stop_together(stop, self.ranks, where)
        lock = self.paths.round(task.round, self.config.training.rounds).task_lock
        with _round_to_itself(lock, task, where, stop) if self.ranks.first else nullcontext():
            if self.ranks.first:
                lock.write_text(
                    f"{socket.gethostname()}, process {os.getpid()}, {self.device}\n"
                )  # for `layerwise status`
            run = self.round(task.round, stop, notify)
            _check_needs(task, run)
            self.ranks.barrier()  # all have read the state, before the first one changes it
            perform(task, run)

    def finish(self) -> None:
        """Writes the encoder; every task is done."""
        rounds = self.config.training.rounds
        with _round_to_itself(self.paths.task_lock, Task(rounds, len(self.specs)), "", StopFlag()):
            stitch(self.config, self.paths, self.specs, self.data)
            for paths in (self.paths.round(number, rounds) for number in range(1, rounds + 1)):
                if paths.state.exists():
                    state = RunState.load(paths.state)
                    state.from_stage = None
                    state.save(paths.state)

    def round(self, number: int, stop: StopFlag, notify: Notify) -> Run:
        """A round as the disk has it now, and those before it."""
        run, rounds = None, self.config.training.rounds
        for each in range(1, number + 1):
            paths = self.paths.round(each, rounds)
            if each < number and not paths.state.exists():  # of a finished run, a user may have deleted it
                continue
            state = RunState.load(paths.state)
            run = Run(
                self.config,
                each,
                paths,
                state,
                self.data,
                self.split,
                self.specs,
                self.memory_plans,
                self.storage,
                self.device,
                stop,
                notify,
                run,
                self.ranks,
            )
        assert run is not None
        return run


def open_task_runner(out: Path, device: str | None = None) -> TaskRunner:
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
    paths, on = RunPaths(out, Path(main.caches)), find_device(config.training.device)
    data = open_data(config.data, shortest_sample(config))
    if data.identity != main.data_identity:
        raise RunError(f"The data of {out} have changed since it was prepared; bring the old ones back.")
    furthest = RunState.load(paths.furthest_round(config.training.rounds).state)
    storage = CachePlan.of(furthest.stages)
    specs = cut_network(config, data, on, None, main.cut)
    if specs[0].network.identity != main.network:
        raise RunError(
            f"--net {config.net.name} makes another network than {out} was prepared with: it has been changed, or its weights "
            "are drawn from another generator than torch's. Bring the old one back, or start anew with --overwrite."
        )
    done = {record.stage for record in main.stages if record.status == "done"}
    memory_plans = fit_to_budget(config, specs, storage, on, done, StopFlag())
    return TaskRunner(config, paths, data, split_samples(data, config), specs, memory_plans, storage, on)


def _check_needs(task: Task, run: Run) -> None:
    """Raises RunError where the round before has not ended for the stage: a job that is out of date came too early."""
    if run.earlier is None or is_trained(run.state.record(task.stage)):
        return
    before = run.earlier.state.record(task.stage)
    if not is_trained(before):
        raise RunError(
            f"Stage {task.stage} of round {task.round} needs round {task.round - 1}, where that stage is {before.status}: the "
            "run has been changed since this task was handed out; start the run again."
        )


@contextmanager
def _round_to_itself(lock: Path, task: Task, where: str, stop: StopFlag) -> Iterator[None]:
    """Within a round one task follows another, so whoever performs one has its files to itself.

    Raises RunError where another process keeps them, and Interrupted, which says where, while it waits.
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

"""A run as a process holds it that performs tasks of it: the data, the stages, how they are laid out and stored.

A process that joins a run later opens the same from the run directory. What is done is read from the disk before each task,
so that nothing of it is passed between processes."""

import os
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from layerwise.config import Config, load, with_options
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.errors import BudgetError, RunError
from layerwise.events import Notify
from layerwise.memory.device import find_device, share_one_heap
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.nets import shortest_sample
from layerwise.run_store import RunState, RunStore
from layerwise.stop import StopFlag
from layerwise.training.budget import StageLayout, lay_out, smallest_budget, smallest_layout
from layerwise.training.cache_plan import CachePlan, below
from layerwise.training.cut import cut_network
from layerwise.training.encoder import stitch
from layerwise.training.run import Run
from layerwise.training.samples import split_samples
from layerwise.training.schedule import Task, stop_together
from layerwise.training.spec import StageSpec
from layerwise.training.task import perform


@dataclass(frozen=True, slots=True)
class TaskRunner:
    """What is the same for all rounds."""

    config: Config
    store: RunStore
    data: DataSet
    split: np.ndarray
    """uint8 [N], see training.split."""
    specs: list[StageSpec]
    layouts: list[StageLayout]
    storage: CachePlan
    device: torch.device
    ranks: Ranks = ALONE
    """Who performs its tasks together; the first one holds the locks."""

    def perform(self, task: Task, stop: StopFlag, notify: Notify) -> None:
        """Performs a task whose needs are met, or finds it done. Raises Interrupted after saving."""
        of_round = f" of round {task.round}" if self.config.training.rounds > 1 else ""
        where = f"before stage {task.stage}{of_round}"
        stop_together(stop, self.ranks, where)
        here = self.store.round(task.round, self.config.training.rounds)
        with here.lock_task(_busy(task), lambda: stop.raise_if_set(where)) if self.ranks.first else nullcontext():
            if self.ranks.first:
                here.write_worker(f"{socket.gethostname()}, process {os.getpid()}, {self.device}")
            run = self.round(task.round, stop, notify)
            _check_needs(task, run)
            self.ranks.meet()  # all have read the state, before the first one changes it
            perform(task, run)

    def finish(self) -> None:
        """Writes the encoder; every task is done."""
        rounds = self.config.training.rounds
        with self.store.lock_task(_busy(Task(rounds, len(self.specs))), lambda: None):
            stitch(self.config, self.store, self.specs, self.data)
            for store in (self.store.round(number, rounds) for number in range(1, rounds + 1)):
                if store.exists:
                    state = store.load_state()
                    state.from_stage = None
                    store.save_state(state)

    def round(self, number: int, stop: StopFlag, notify: Notify) -> Run:
        """A round as the disk has it now, and those before it."""
        run, rounds = None, self.config.training.rounds
        for each in range(1, number + 1):
            store = self.store.round(each, rounds)
            if each < number and not store.exists:  # of a finished run, a user may have deleted it
                continue
            state = store.load_state()
            run = Run(
                self.config,
                each,
                store,
                state,
                self.data,
                self.split,
                self.specs,
                self.layouts,
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
    store, on = RunStore(out, Path(main.caches)), find_device(config.training.device)
    data = open_data(config.data, shortest_sample(config))
    if data.identity != main.data_identity:
        raise RunError(f"The data of {out} have changed since it was prepared; bring the old ones back.")
    furthest = store.furthest_round(config.training.rounds).load_state()
    storage = CachePlan(tuple(bool(record.cached) for record in furthest.stages))
    specs = cut_network(config, data, on, None, main.cut)
    if specs[0].network.identity != main.network:
        raise RunError(
            f"--net {config.net.name} makes another network than {out} was prepared with: it has been changed, or its weights "
            "are drawn from another generator than torch's. Bring the old one back, or start anew with --overwrite."
        )
    done = {record.stage for record in main.stages if record.status == "done"}
    layouts = layouts_of(config, specs, storage, on, done, StopFlag())
    return TaskRunner(config, store, data, split_samples(data, config), specs, layouts, storage, on)


def layouts_of(
    config: Config, specs: Sequence[StageSpec], storage: CachePlan, device: torch.device, done: set[int], stop: StopFlag
) -> list[StageLayout]:
    """How each stage is laid out; that of a stage that is done already need not fit.

    Raises BudgetError that names the neediest stage, Interrupted between two stages.
    """
    layouts, refused = [], {}
    for spec in specs:
        stop.raise_if_set("before anything was trained")
        recomputed = below(specs, spec.stage, storage)
        try:
            layouts.append(lay_out(config, spec, device, recomputed))
        except BudgetError as error:
            layouts.append(smallest_layout(config, spec, recomputed))
            if spec.stage not in done:
                refused[smallest_budget(config, spec, device, recomputed)] = error
    if refused:
        raise refused[max(refused)]
    return layouts


def _check_needs(task: Task, run: Run) -> None:
    """Raises RunError where the round before has not ended for the stage: a job that is out of date came too early."""
    if run.earlier is None or run.state.record(task.stage).is_trained:
        return
    before = run.earlier.state.record(task.stage)
    if not before.is_trained:
        raise RunError(
            f"Stage {task.stage} of round {task.round} needs round {task.round - 1}, where that stage is {before.status}: the "
            "run has been changed since this task was handed out; start the run again."
        )


def _busy(task: Task) -> RunError:
    return RunError(
        f"Another process is at work in round {task.round}, where stage {task.stage} comes next; wait for it, or stop it."
    )

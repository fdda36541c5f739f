"""Performs one task of a run under its lock, in whichever process; opens a run that another process has prepared.

What is done is read from the disk before each task, so processes pass nothing of it to each other.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from layerwise.config import named_here, with_options
from layerwise.data.open import open_data
from layerwise.errors import RunError
from layerwise.events import Notify
from layerwise.memory.determinism import same_bits, settle_products
from layerwise.memory.device import find_device, share_one_heap
from layerwise.memory.meter import meter_for
from layerwise.nets import shortest_sample
from layerwise.run_store import open_run
from layerwise.stop import StopFlag
from layerwise.training.budget import fit_to_budget
from layerwise.training.cache_plan import CachePlan
from layerwise.training.context import RunContext
from layerwise.training.cut import cut_network
from layerwise.training.encoder import stitch
from layerwise.training.first_weights import is_network_of, without_lost_weights
from layerwise.training.resume import refuse_other_classes
from layerwise.training.run import Round, Run
from layerwise.training.samples import split_samples
from layerwise.training.schedule import Task
from layerwise.training.task import perform


def perform_tasks(tasks: Sequence[Task], run: Run, stop: StopFlag, notify: Notify) -> None:
    """Performs tasks in the order given, in which each comes behind those that it needs."""
    for task in tasks:
        perform_task(task, run, stop, notify)


def perform_task(task: Task, run: Run, stop: StopFlag, notify: Notify) -> None:
    """Performs a task whose needs are met, or finds it done. Raises Interrupted after saving."""
    context = RunContext(run.device, meter_for(run.device, None), stop=stop, notify=notify, ranks=run.ranks)
    of_round = f" of round {task.round}" if run.rounds > 1 else ""
    where = f"before stage {task.stage}{of_round}"
    context.raise_if_stopped(where)
    store = run.store.round(task.round, run.rounds)
    with store.lock_task(_busy(task), lambda: stop.raise_if_set(where)) if run.ranks.first else nullcontext():
        if run.ranks.first:
            store.write_worker(f"{socket.gethostname()}, process {os.getpid()}, {run.device}")
        round = run.round(task.round)
        _check_needs(task, round)
        run.ranks.barrier()  # all ranks have read the state before the first one changes it
        with same_bits(run.config.training.deterministic):
            perform(task, round, context)


def write_encoder(run: Run) -> None:
    """Stitches the trained stages into encoder.safetensors; every task must be done."""
    with run.store.lock_task(_busy(Task(run.rounds, len(run.specs))), lambda: None):
        stitch(run)
        for store in (run.store.round(number, run.rounds) for number in range(1, run.rounds + 1)):
            if store.exists:
                state = store.load_state()
                state.from_stage = None
                store.save_state(state)


def open_prepared_run(out: Path, functions: Mapping[str, str | None], device: str | None = None) -> Run:
    """A run that another process has prepared. device: in place of the one in its options.

    functions: those that it may call, by dotted keys, as `config.named_functions` gives them. Raises ConfigError where its
    options name others, RunError where it was given its network as an object, which no other process can know.
    """
    share_one_heap()
    store, main = open_run(out)
    config = named_here(main.config, functions, store.state)
    settle_products(config.training.deterministic)
    if device is not None:
        config = with_options(config, {"training.device": device})
    if main.network and ":" not in config.net.name:
        raise RunError(
            f"The network of {out} was given as an object, which only its own process knows; leave --devices and --engine out."
        )
    if store.recorded_caches(main) is None:
        raise RunError(f"The caches of {out} are gone, or another run has taken their folder; start the run again.")
    on, data = find_device(config.training.device), open_data(config.data, shortest_sample(config))
    if data.identity != main.data_identity:
        raise RunError(f"The data of {out} have changed since it was prepared; bring the old ones back.")
    refuse_other_classes(main, config, data)
    cache_plan = CachePlan.of(store.furthest_round(config.training.rounds).load_state().stages)
    specs = cut_network(without_lost_weights(config, store), data, on, None, main.cut)
    if not is_network_of(main, store, specs[0].network):
        raise RunError(
            f"--net {config.net.name} makes another network than {out} was prepared with: it has been changed. Bring the old "
            "one back, or start anew with --overwrite."
        )
    done = {record.stage for record in main.stages if record.status == "done"}
    memory_plans = fit_to_budget(config, specs, cache_plan, on, done, StopFlag())
    return Run(config, store, data, split_samples(data, config), specs, memory_plans, cache_plan, on)


def _check_needs(task: Task, round: Round) -> None:
    """Raises RunError where the round before has not ended for the stage: a job that is out of date came too early."""
    if round.earlier is None or round.state.record(task.stage).is_trained:
        return
    before = round.earlier.state.record(task.stage)
    if not before.is_trained:
        raise RunError(
            f"Stage {task.stage} of round {task.round} needs round {task.round - 1}, where that stage is {before.status}: the "
            "run has been changed since this task was handed out; start the run again."
        )


def _busy(task: Task) -> RunError:
    return RunError(
        f"Another process is at work in round {task.round}, where stage {task.stage} comes next; wait for it, or stop it."
    )

"""A run from its configuration to its encoder: prepare or resume the run directory, perform the tasks, stitch.

Starting a run and resuming it are the same call. What is done is read from the disk, never from a flag.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from layerwise.config import OWN, Config, with_options
from layerwise.data.open import open_data
from layerwise.data.source import DataSet, said_of, telling_labels
from layerwise.engines import dask, processes, torchrun
from layerwise.engines.elsewhere import measure_elsewhere
from layerwise.engines.machine import machine
from layerwise.engines.sbatch import refuse_while_queued
from layerwise.engines.task_runner import perform_tasks, write_encoder
from layerwise.engines.torchrun import device_of
from layerwise.errors import ConfigError, RunError, UnusableCache
from layerwise.events import Message, Notify, RunStarted, silent
from layerwise.files import refuse_unwritable
from layerwise.forecast import END_TO_END, is_end_to_end
from layerwise.memory.determinism import said_of_float32, settle_products
from layerwise.memory.device import share_one_heap
from layerwise.memory.driver import why_less_than_budget
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.memory.rates import measured_rates
from layerwise.nets import shortest_sample
from layerwise.nets.network import Network
from layerwise.run_store import RunState, RunStore
from layerwise.stop import StopFlag
from layerwise.tracking import TrackingCallback, find_service, open_service
from layerwise.training.budget import fit_to_budget
from layerwise.training.cache_plan import free_for_caches, plan_caches, sealed_bytes
from layerwise.training.cache_retention import check_retained_caches, delete_unneeded_caches, mend
from layerwise.training.cut import cut_network
from layerwise.training.first_weights import other_weights, weights_of_new_run, without_lost_weights
from layerwise.training.further import further_trained, left_out
from layerwise.training.optimizer import Optimization
from layerwise.training.resume import (
    StartRequest,
    decided,
    earlier_records,
    intended,
    missing_weights,
    prepare_rounds,
)
from layerwise.training.run import Round, Run
from layerwise.training.samples import split_samples
from layerwise.training.schedule import Task, tasks_of_run
from layerwise.training.spec import check_shareable


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run."""

    paths: RunStore
    state: RunState
    config: Config
    labels: tuple[str, ...]
    """Labels that the data carry, for probes: those of two values and more."""


@dataclass(frozen=True, slots=True)
class UserObjects:
    """Objects that are given in Python, each in place of what the options name. Other processes cannot know them."""

    network: Network | None = None
    cut: Sequence[int] | None = None
    """Layers in each stage."""
    data: DataSet | None = None
    optimization: Optimization | None = None
    """In place of Adam."""


def run(
    config: Config,
    objects: UserObjects = UserObjects(),
    *,
    from_stage: int | None = None,
    overwrite: bool = False,
    stop: StopFlag | None = None,
    notify: Notify = silent,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Trains every stage that is not done yet, and writes the encoder.

    from_stage: retrain this stage and those above it from the cache below. overwrite: delete the run in `config.out`
    first. stop: a flag that ends the run after the step in hand. notify: receives the events. ranks: the processes that
    torchrun has started, see `engines.torchrun.join_ranks`; all but the first follow what the first one does.
    Raises Interrupted after saving when asked to stop, and other LayerwiseErrors where the request cannot be met.
    """
    stop = stop or StopFlag()
    if not ranks.first:
        return _result(torchrun.follow(config, ranks, stop))
    with prepared_run(config, objects, StartRequest(from_stage, overwrite), stop, notify, ranks) as (
        prepared,
        tasks,
        notify_all,
    ):
        _execute(tasks, prepared, stop, notify_all)
        write_encoder(prepared)
        return _result(prepared)


def _result(run: Run) -> RunResult:
    return RunResult(run.store, run.store.load_state(), run.config, telling_labels(run.data))


@contextmanager
def prepared_run(
    config: Config,
    objects: UserObjects,
    request: StartRequest,
    stop: StopFlag,
    notify: Notify,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Run, list[Task], Notify]]:
    """Holds a run while its tasks are performed, or submitted. Parameters and errors as those of `run`.

    Gives the run, prepared on the disk; what is to be done, each task behind those that it needs; and who is to be notified:
    whoever started the run, and the tracking service.
    """
    share_one_heap()
    settle_products(config.training.deterministic)
    service = find_service(config.training.log)
    _refuse_objects_elsewhere(config, objects, ranks)
    device = device_of(config.engine.devices[0] if config.engine.devices else config.training.device, ranks)
    if device.type == "cuda" and (config.engine.devices or config.engine.name != "local"):
        measure_elsewhere(device)
    store, rounds = RunStore.of(config.out, config.cache.dir), config.training.rounds
    data = objects.data or open_data(config.data, shortest_sample(config))
    planned_for = store.state_bytes()
    config = _with_rates(config, store, device)
    sizes = objects.cut or (None if request.overwrite else _earlier_cut(store, config))
    cut_as = without_lost_weights(config, store) if request.goes_on(store) else config
    specs = cut_network(cut_as, data, device, objects.network, sizes, objects.optimization)
    check_shareable(specs, ranks)
    split = split_samples(data, config)
    furthest = store.furthest_round(rounds)
    earlier = earlier_records(furthest, config, request)
    cache_plan = plan_caches(
        config,
        specs,
        data,
        free_for_caches(store.caches),
        decided(earlier),
        sealed_bytes(furthest),
        intended(earlier, furthest, config),
    )
    finished = {each.stage for each in earlier_records(store, config, request) if each.status == "done"}
    memory_plans = fit_to_budget(config, specs, cache_plan, device, finished, stop)
    store.refuse_foreign_folder()
    store.refuse_links()
    for folder in (store.out, store.caches):
        refuse_unwritable(folder)
    if not (store.exists and store.is_copy(store.load_state())):  # of a copy the jobs are those of the original
        refuse_while_queued(store.jobs)
    request.check(store, len(specs))
    first = None if request.goes_on(store) else weights_of_new_run(config, store, specs[0].network)
    # The locks come this late because a request that is refused leaves no folder behind.
    with store.lock_run():
        with store.lock_all_tasks(rounds):
            if store.state_bytes() != planned_for:
                raise RunError(f"Another process has gone on with {store.out} meanwhile; start the same command again.")
            run = Run(config, store, data, split, specs, memory_plans, cache_plan, device, ranks)
            lines = []
            if request.goes_on(store):
                state = store.load_state()
                lines = missing_weights(state, store) + other_weights(state, specs[0].network)
            states = prepare_rounds(run, request, first)
            del first  # they may be large, and lie in the folder now
            state = states[rounds]
            lines += further_trained(state) + (left_out(state, config) if request.from_stage is None else [])
            store.write_machine(machine(device))
            tracker = open_service(config.training.log, service, store, state.run_id, config)
        with TrackingCallback(tracker, notify) as notify_all:
            for line in (*_described(run), *lines):
                notify_all(Message(line))
            done = tuple(record.stage for record in state.stages if record.status == "done")
            notify_all(RunStarted(len(specs), done, config.training.max_epochs, state.budget_bytes, rounds))
            with store.lock_all_tasks(rounds):
                tasks = _tasks_left([run.round(number) for number in states], notify_all)
            yield run, tasks, notify_all


def _with_rates(config: Config, store: RunStore, device: torch.device) -> Config:
    """Every start and every worker of a run chooses its plans by the same rates, so that they take the same steps."""
    if config.memory.flops_per_byte is not None:
        return config
    earlier = store.load_state() if store.exists else None
    known = earlier.config.memory.flops_per_byte if earlier and earlier.device == str(device) else None
    if known is None and config.memory.gpu_mem is None:
        return config
    return with_options(config, {"memory.flops_per_byte": known or measured_rates(device).flops_per_byte})


def _refuse_objects_elsewhere(config: Config, objects: UserObjects, ranks: Ranks) -> None:
    """Raises ConfigError where other processes take part in a run that has an object of the user's."""
    are_given = {
        "network": objects.network is not None,
        "data set": config.data.source == OWN,
        "optimizer": objects.optimization is not None,
    }
    given = next((name for name, is_given in are_given.items() if is_given), None)
    if given and (config.engine.devices or config.engine.name != "local" or ranks.count > 1):
        raise ConfigError(
            f"The {given} was given as an object, which other processes cannot know; leave devices and engine out, or name a "
            "function that makes it, as in --net and --data package.module:function."
        )


def _execute(tasks: list[Task], run: Run, stop: StopFlag, notify: Notify) -> None:
    """Has the engine of the options perform the tasks."""
    options = run.config.engine
    if run.ranks.count > 1:
        torchrun.execute(tasks, run, stop, notify)
    elif options.name == "dask" and tasks:
        dask.execute(tasks, run, stop, notify)
    elif options.devices and tasks:
        processes.execute(tasks, run, options.devices, stop, notify)
    else:
        perform_tasks(tasks, run, stop, notify)


def tasks_left(config: Config, request: StartRequest) -> list[Task]:
    """What `prepared_run` would find to do, were nothing damaged; nothing is written."""
    store, rounds = RunStore.of(config.out, config.cache.dir), config.training.rounds
    data = open_data(config.data, shortest_sample(config))
    device, cut = device_of(config.training.device, ALONE), None if request.overwrite else _earlier_cut(store, config)
    cut_as = without_lost_weights(config, store) if request.goes_on(store) else config
    stages = len(cut_network(cut_as, data, device, None, cut))
    done = {
        Task(number, record.stage)
        for number in range(1, rounds + 1)
        for record in earlier_records(_of_round(store, number, rounds), config, request)
        if record.status == "done"
    }
    return [task for task in tasks_of_run(stages, rounds) if task not in done]


def _of_round(store: RunStore, number: int, rounds: int) -> RunStore:
    """Of a round that was deleted, for it had served its purpose, the run itself."""
    here = store.round(number, rounds)
    return here if here.exists or not store.exists else store


def _tasks_left(rounds: list[Round], notify: Notify) -> list[Task]:
    """What is to be done, each task behind those that it needs. Caches that cannot be read are to be made again."""
    for round in rounds:
        delete_unneeded_caches(round)
        _rebuild_unusable_caches(round, notify)
    states, run = {round.number: round.state for round in rounds}, rounds[0].run
    tasks = tasks_of_run(len(run.specs), run.rounds)
    return [task for task in tasks if task.round in states and states[task.round].record(task.stage).status != "done"]


def _rebuild_unusable_caches(round: Round, notify: Notify) -> None:
    """Has each cache that is to stay made again where it cannot be used."""
    for _ in round.run.specs:
        try:
            check_retained_caches(round)
            return
        except UnusableCache as error:
            mend(error, round, notify)


def _earlier_cut(store: RunStore, config: Config) -> list[int] | None:
    """How an earlier start has cut the network, so that this one goes on with it whatever its budget."""
    if not store.exists or config.training.schedule == "simultaneous":
        return None
    cut = store.load_state().cut
    return cut if config.training.stages in (None, "fewest", len(cut)) else None


def _described(run: Run) -> list[str]:
    """Lines on what is about to be trained."""
    config, data, specs, memory_plans = run.config, run.data, run.specs, run.memory_plans
    stages = "1 stage" if len(specs) == 1 else f"{len(specs)} stages"
    lines = [f"{len(data.ids)} samples from {config.data.source}, {stages}"]
    if is_end_to_end([len(spec.layers) for spec in specs]):
        lines.append(END_TO_END)
    options = config.training
    lines.append(said_of_float32(run.device, options.precision, options.deterministic))
    lines.append(why_less_than_budget(run.device, config.memory.gpu_mem))
    lines = [line for line in lines if line]
    for spec, plan in zip(specs, memory_plans, strict=True):
        if plan.why:
            lines.append(f"stage {spec.stage}: {plan}, because {plan.why}")
    return [*lines, *run.cache_plan.notes, *said_of(data)]

"""A run from its configuration to its encoder: prepare or resume the run directory, perform the tasks, stitch.

Starting a run and resuming it are the same call. What is done is read from the disk, never from a flag.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from layerwise.config import OWN, Config
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.engines import dask, in_process, processes
from layerwise.engines import torchrun as shared
from layerwise.engines.machine import machine
from layerwise.engines.sbatch import refuse_while_queued
from layerwise.engines.task_runner import TaskRunner, layouts_of
from layerwise.engines.torchrun import device_of
from layerwise.errors import ConfigError, RunError, UnusableCache
from layerwise.events import Message, Notify, RunStarted, silent
from layerwise.files import refuse_unwritable
from layerwise.memory.device import share_one_heap
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.nets import shortest_sample
from layerwise.nets.network import Network
from layerwise.run_store import RunState, RunStore
from layerwise.stop import StopFlag
from layerwise.tracking.following import Following, find_service, open_service
from layerwise.training.batch_effects import check_shareable
from layerwise.training.budget import StageLayout
from layerwise.training.cache_plan import CachePlan, free_for_caches, plan_caches, sealed_bytes
from layerwise.training.cache_retention import check_retained_caches, delete_unneeded_caches, mend
from layerwise.training.cut import cut_network
from layerwise.training.optimizer import Optimization
from layerwise.training.resume import StartRequest, decided, earlier_records, intended, prepare_rounds
from layerwise.training.run import Run
from layerwise.training.samples import split_samples
from layerwise.training.schedule import Task, tasks_of_run
from layerwise.training.spec import StageSpec


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run."""

    paths: RunStore
    state: RunState
    config: Config
    labels: tuple[str, ...]
    """Labels that the data carry, for probes."""


def run(
    config: Config,
    *,
    from_stage: int | None = None,
    overwrite: bool = False,
    network: Network | None = None,
    cut: Sequence[int] | None = None,
    data: DataSet | None = None,
    optimization: Optimization | None = None,
    stop: StopFlag | None = None,
    notify: Notify = silent,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Trains every stage that is not done yet, and writes the encoder.

    from_stage: retrain this stage and those above it from the cache below. overwrite: delete the run in `config.out`
    first. network: in place of the one that the options name. cut: layers in each stage, in place of what the options say
    of it. data: what the options name, where it is open already. optimization: in place of Adam. stop: a flag that ends the
    run after the step in hand.
    notify: is told what happens. ranks: the processes that torchrun has started, see `engines.torchrun.join_ranks`; in all but
    the first, the call follows what the first one does.
    Raises Interrupted after saving when asked to stop, and other LayerwiseErrors where the request cannot be met.
    """
    stop = stop or StopFlag()
    if not ranks.first:
        return _result(shared.follow(ranks, stop))
    with prepared_run(
        config,
        from_stage=from_stage,
        overwrite=overwrite,
        network=network,
        cut=cut,
        data=data,
        optimization=optimization,
        stop=stop,
        notify=notify,
        ranks=ranks,
    ) as work:
        _execute(work.tasks, work.run, stop, work.told)
        work.run.finish()
        return _result(work.run)


def _result(run: TaskRunner) -> RunResult:
    labels = (*run.data.labels, *run.data.frame_label_names)
    return RunResult(run.store, run.store.load_state(), run.config, labels)


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that is prepared on the disk, for an engine."""

    run: TaskRunner
    tasks: list[Task]
    """What is to be done, each behind those that it needs."""
    told: Notify


@contextmanager
def prepared_run(
    config: Config,
    *,
    from_stage: int | None,
    overwrite: bool,
    network: Network | None,
    cut: Sequence[int] | None,
    data: DataSet | None,
    stop: StopFlag,
    notify: Notify,
    optimization: Optimization | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[PreparedRun]:
    """Holds a run while its tasks are performed, or handed in. Parameters and errors as those of `run`."""
    share_one_heap()
    service = find_service(config.training.log)
    objects = {
        "network": network is not None,
        "data set": config.data.source == OWN,
        "optimizer": optimization is not None,
    }
    given = next((name for name, is_given in objects.items() if is_given), None)
    if given and (config.engine.devices or config.engine.name != "local" or ranks.count > 1):
        raise ConfigError(
            f"The {given} was given as an object, which other processes cannot know; leave devices and engine out, or name a "
            "function that makes it, as in --net and --data package.module:function."
        )
    device = device_of(config.engine.devices[0] if config.engine.devices else config.training.device, ranks)
    store, rounds = RunStore.of(config.out, config.cache.dir), config.training.rounds
    request = StartRequest(from_stage, overwrite)
    data = data or open_data(config.data, shortest_sample(config))
    planned_for = store.state_bytes()
    sizes = cut or (None if overwrite else _earlier_cut(store, config))
    specs = cut_network(config, data, device, network, sizes, optimization)
    check_shareable(specs, ranks)
    split = split_samples(data, config)
    furthest = store.furthest_round(rounds)
    earlier = earlier_records(furthest, config, request)
    storage = plan_caches(
        config,
        specs,
        data,
        free_for_caches(store.caches),
        decided(earlier),
        sealed_bytes(furthest, len(specs)),
        intended(earlier, furthest, config),
    )
    finished = {each.stage for each in earlier_records(store, config, request) if each.status == "done"}
    layouts = layouts_of(config, specs, storage, device, finished, stop)
    store.refuse_foreign_folder()
    for folder in (store.out, store.caches):
        refuse_unwritable(folder)
    refuse_while_queued(store.jobs)
    request.check(store, len(specs))
    # The locks come this late because a request that is refused leaves no folder behind.
    with store.lock_run():
        with store.lock_all_tasks(rounds):
            if store.state_bytes() != planned_for:
                raise RunError(f"Another process has gone on with {store.out} meanwhile; start the same command again.")
            states = prepare_rounds(config, store, data, specs, device, request, storage.cached)
            state, opened = (
                states[rounds],
                TaskRunner(config, store, data, split, specs, layouts, storage, device, ranks),
            )
            store.write_machine(machine(device))
            tracker = open_service(config.training.log, service, store, state.run_id, config)
        with Following(tracker, notify) as told:
            for line in _described(config, data, specs, layouts, storage):
                told(Message(line))
            done = tuple(record.stage for record in state.stages if record.status == "done")
            told(RunStarted(len(specs), done, config.training.max_epochs, state.budget_bytes, rounds))
            with store.lock_all_tasks(rounds):
                tasks = _tasks(opened, [opened.round(number, stop, told) for number in states])
            yield PreparedRun(opened, tasks, told)


def _execute(tasks: list[Task], opened: TaskRunner, stop: StopFlag, notify: Notify) -> None:
    options = opened.config.engine
    if opened.ranks.count > 1:
        shared.execute(tasks, opened, stop, notify)
    elif options.name == "dask" and tasks:
        dask.execute(tasks, opened, stop, notify)
    elif options.devices and tasks:
        processes.execute(tasks, opened, options.devices, stop, notify)
    else:
        in_process.execute(tasks, opened, stop, notify)


def tasks_left(config: Config, overwrite: bool, from_stage: int | None) -> list[Task]:
    """What `begun` would find to do, were nothing damaged; nothing is written."""
    store, rounds = RunStore.of(config.out, config.cache.dir), config.training.rounds
    request = StartRequest(from_stage, overwrite)
    data = open_data(config.data, shortest_sample(config))
    device, cut = device_of(config.training.device, ALONE), None if overwrite else _earlier_cut(store, config)
    stages = len(cut_network(config, data, device, None, cut))
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


def _tasks(opened: TaskRunner, rounds: list[Run]) -> list[Task]:
    """What is to be done, each behind those that it needs; of caches that cannot be used, they are made anew."""
    for run in rounds:
        delete_unneeded_caches(run)
        _mend_kept(run)
    states = {run.round: run.state for run in rounds}
    tasks = tasks_of_run(len(opened.specs), opened.config.training.rounds)
    return [task for task in tasks if task.round in states and states[task.round].record(task.stage).status != "done"]


def _mend_kept(run: Run) -> None:
    """Has each cache that is to stay made again where it cannot be used."""
    for _ in run.specs:
        try:
            check_retained_caches(run)
            return
        except UnusableCache as error:
            mend(error, run)


def _earlier_cut(store: RunStore, config: Config) -> list[int] | None:
    """How an earlier start has cut the network, so that this one goes on with it whatever its budget."""
    if not store.exists or config.training.schedule == "simultaneous":
        return None
    cut = store.load_state().cut
    return cut if config.training.stages in (None, len(cut)) else None


def _described(
    config: Config, data: DataSet, specs: list[StageSpec], layouts: list[StageLayout], storage: CachePlan
) -> list[str]:
    chosen = config.training.stages is None and config.memory.gpu_mem is not None
    one_pass = all(layout.placement.passes == 1 for layout in layouts)
    held = (
        ", the fewest that --gpu-mem holds in one pass"
        if one_pass
        else ", for no cut trains in one pass under --gpu-mem"
    )
    why = f"{held} (--stages N cuts otherwise)" if chosen else ""
    stages = "1 stage" if len(specs) == 1 else f"{len(specs)} stages"
    lines = [f"{len(data.ids)} samples from {config.data.source}, {stages}{why}"]
    for stage, layout in zip(specs, layouts, strict=True):
        if layout.why:
            lines.append(f"stage {stage.stage}: {layout.placement}, because {layout.why}")
    lines += storage.notes
    if data.skipped:
        lines.append(f"{len(data.skipped)} files skipped:")
        lines += [f"  {entry.path}: {entry.reason}" for entry in data.skipped]
    return lines

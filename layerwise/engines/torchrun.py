"""Joins the processes that torchrun has started for one run, gives each its device, and performs the tasks in all of them.

The first rank prepares the run. The others open it from the disk when it is prepared. From then on all ranks do the same at
the same time, each with its share of the samples; only the first rank writes and sends events.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from layerwise.config import Config, named_functions
from layerwise.engines.task_runner import open_prepared_run, perform_tasks
from layerwise.errors import ConfigError, Interrupted, ToldElsewhere
from layerwise.events import Notify, silent
from layerwise.memory.device import find_device
from layerwise.memory.plan import MemoryPlan
from layerwise.memory.ranks import ALONE, LostRank, Ranks
from layerwise.stop import StopFlag
from layerwise.training.run import Run
from layerwise.training.schedule import Task

SILENCE = timedelta(hours=2)
"""How long a rank waits for another that lives but does not answer: the first one may be packing a cache. One that has ended
is noticed at once."""

STUCK = timedelta(minutes=10)
"""How long GPUs wait for another one within a step; then torch ends the process, and torchrun starts all of them again."""

PARTING = timedelta(seconds=10)

_SET_BY_TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

_JOINED: "list[tuple[dist.Store, Ranks]]" = []
"""Of this process, once it has joined others."""


@contextmanager
def join_ranks(config: Config) -> Iterator[Ranks]:
    """The ranks of this run, from the environment that torchrun sets; ALONE without it.

    Raises ConfigError where the processes are on several machines, or the options ask for what they cannot share; all ranks but
    the first raise ToldElsewhere then.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if os.environ.keys() >= _SET_BY_TORCHRUN else 1
    if count == 1:
        yield ALONE
        return
    try:
        _check(config, count)
    except ConfigError as error:
        raise error if os.environ["RANK"] == "0" else ToldElsewhere(str(error), error.exit_code) from None
    found, rank, count = next(dist.rendezvous("env://"))
    # torchrun keeps its store when it starts all again, and in it the addresses of those that are gone.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=SILENCE)
    on_gpus = device_of(config.training.device, Ranks(rank, count)).type == "cuda"
    ranks = Ranks(rank, count, dist.new_group(backend="nccl", timeout=STUCK) if on_gpus else None)
    _JOINED.append((store, ranks))
    # What the exchange itself takes of a GPU is taken now, before the budget is shared out.
    ranks.all_reduce([torch.zeros(1, device=device_of(config.training.device, ranks))])
    yield ranks


def leave(exit_code: int) -> None:
    """Ends a process that has joined others, at once; does nothing in one that has not.

    Where all of them end alike, each waits a moment until all are about to: one that goes early may cut off the answer that
    another is still reading. The interpreter is not wound up, for torch's own threads may abort the process meanwhile.
    """
    if not _JOINED:
        return
    store, ranks = _JOINED[0]
    if exit_code in (0, Interrupted.exit_code):
        with suppress(RuntimeError):
            store.set(f"rank {ranks.rank} ends", "")
            store.wait([f"rank {rank} ends" for rank in range(ranks.count)], PARTING)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def device_of(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank: with several, its own GPU by its place on the machine. Raises ConfigError."""
    if ranks.count == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return find_device(name)
    device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
    torch.cuda.set_device(device)
    return device


def is_restart() -> bool:
    """Whether torchrun has started these processes again: then there is a run to go on with, whatever was to go first."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _check(config: Config, count: int) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    options = config.training
    if here != count:
        raise ConfigError(
            f"{count} processes share this run and {here} of them are on this machine; start all of them on one, with "
            "torchrun --nproc-per-node."
        )
    if options.batch_size < count:
        raise ConfigError(
            f"--batch-size {options.batch_size} leaves some of {count} processes without a window; give at least {count}, or "
            "start fewer processes."
        )
    if options.rounds > 1:
        raise ConfigError(
            f"--rounds {options.rounds} and {count} processes to a stage do not go together; leave one out."
        )
    if config.engine.devices or config.engine.name != "local":
        raise ConfigError(
            f"torchrun has started {count} processes to share each stage; leave --devices and --engine out."
        )
    if config.cache.scratch:
        raise ConfigError(f"cache.scratch {config.cache.scratch}: {count} processes write one cache; leave it out.")
    if options.schedule != "sequential":
        raise ConfigError(
            f"training.schedule {options.schedule} trains all modules in one process; start it without torchrun."
        )
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device {options.device}: with {count} processes each has a GPU of its own; give --device cuda, or leave it out."
        )
    gpus = torch.cuda.device_count()
    on_gpus = options.device == "cuda" or (options.device == "auto" and gpus > 0)
    if on_gpus and gpus < count:
        raise ConfigError(f"{count} processes were started for {gpus} GPUs; start one for each, or give --device cpu.")


@dataclass(frozen=True, slots=True)
class SharedRun:
    """What the first rank tells the others when the run is prepared."""

    out: Path
    device: str
    """As the options name it."""
    tasks: list[Task]
    memory_plans: list[MemoryPlan]
    """As the first device has room for them: all ranks must go through a batch in the same parts."""


def execute(tasks: Sequence[Task], run: Run, stop: StopFlag, notify: Notify) -> None:
    """In the first rank: has the others perform the tasks along with it."""
    run.ranks.broadcast_object(
        SharedRun(run.store.out.resolve(), run.config.training.device, list(tasks), run.memory_plans)
    )
    perform_tasks(tasks, run, stop, notify)


def follow(config: Config, ranks: Ranks, stop: StopFlag) -> Run:
    """In every other rank: waits until the run is prepared, and performs the tasks along with the first.

    config: of this rank's own command, which names the functions that it may call.

    Raises ToldElsewhere where the first ends without having prepared it, and where all of them stop.
    """
    try:
        prepared: SharedRun = ranks.broadcast_object()
    except LostRank as lost:
        raise ToldElsewhere(str(lost), lost.exit_code) from None
    run = open_prepared_run(prepared.out, named_functions(config), str(device_of(prepared.device, ranks)))
    run = replace(run, memory_plans=prepared.memory_plans, ranks=ranks)
    try:
        perform_tasks(prepared.tasks, run, stop, silent)
    except Interrupted as stopped:
        raise ToldElsewhere(str(stopped), stopped.exit_code) from None
    return run

"""A real Dask scheduler and its workers on loopback: the same bits as one process."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from forked_python import ForkedPython
from safetensors.numpy import load_file

from layerwise.config import Config
from layerwise.engines.run import run
from layerwise.errors import ConfigError, Interrupted, RunError, TrainingError
from layerwise.events import Event, StageStarted
from layerwise.run_store import RunState, RunStore
from layerwise.stop import StopFlag

dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")

Tiny = Callable[..., Config]
ROUNDS = {"training.rounds": 2, "training.max_epochs": 16, "engine.name": "dask"}


def bits(out: str | Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(Path(out) / "encoder.safetensors").items()}


@dataclass(frozen=True)
class Cluster:
    """A scheduler, and two nannies which each replace their worker process."""

    address: str
    nannies: list[psutil.Process]

    @property
    def workers(self) -> list[psutil.Process]:
        return [worker for nanny in self.nannies for worker in nanny.children()]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """All its processes are forks of this one."""
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    scheduler = ["scheduler", "--scheduler-file", str(file), "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = ["worker", "--scheduler-file", str(file), "--nthreads", "1", "--memory-limit", "0", "--no-dashboard"]
    processes = []
    with (folder / "log.txt").open("w") as log, dask.config.set({"distributed.worker.multiprocessing-method": "fork"}):
        for command in (scheduler, worker, worker):
            command = [sys.executable, "-m", "distributed.cli.dask_" + command[0], *command[1:]]
            processes.append(ForkedPython(command, cwd=folder, stdout=log, stderr=log))
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with distributed.Client(scheduler_file=str(file)) as client:
        client.wait_for_workers(2, timeout=60)
        address = client.scheduler.address
    yield Cluster(address, [psutil.Process(process.pid) for process in processes[1:]])
    for process in reversed(processes):
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        process.wait()


@pytest.fixture
def config(tiny_speech: Tiny, digits: Path, cluster: Cluster) -> Config:
    return tiny_speech(f"fsdd:{digits}", **ROUNDS, **{"engine.scheduler": cluster.address})


def test_workers_of_a_cluster_end_with_the_bits_of_one_process_though_one_is_killed(
    config: Config, cluster: Cluster, tiny_speech: Tiny, digits: Path, tmp_path: Path
) -> None:
    alone = tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "alone"), **ROUNDS | {"engine.name": "local"})
    run(alone)
    lock = RunStore.of(config.out, config.cache.dir).round(1, 2).task_lock
    killed: list[int] = []

    def kill_whoever_trains(event: Event) -> None:
        if not killed:
            # Whoever holds the lock of the round is in the middle of its task; events may come too late for that.
            busy = [worker for worker in cluster.workers if str(lock) in [file.path for file in worker.open_files()]]
            for worker in busy[:1]:
                killed.append(worker.pid)
                worker.kill()

    run(config, notify=kill_whoever_trains)
    assert len(killed) == 1
    assert bits(config.out) == bits(alone.out)


def test_a_task_whose_workers_die_three_times_ends_the_run_with_the_end_of_a_log(
    config: Config, cluster: Cluster
) -> None:
    lock, killed = RunStore.of(config.out, config.cache.dir).round(1, 2).task_lock, []

    def kill_whoever_trains_the_first_stage(event: Event) -> None:
        if isinstance(event, StageStarted) and len(killed) < 3:
            (busy,) = [worker for worker in cluster.workers if str(lock) in [file.path for file in worker.open_files()]]
            killed.append(busy.pid)
            busy.kill()

    long = config.training.model_copy(update={"max_epochs": 2000, "patience": 2000})
    with pytest.raises(RunError, match=r"(?s)Stage 1 in round 1 has failed 3 times.*scheduler's log:\n.+"):
        run(config.model_copy(update={"training": long}), notify=kill_whoever_trains_the_first_stage)
    assert len(killed) == 3


def test_a_stop_reaches_the_cluster_and_the_same_command_goes_on(config: Config) -> None:
    stop = StopFlag()

    def stop_in_the_second_round(event: Event) -> None:
        if isinstance(event, StageStarted) and event.round == 2:
            stop.reason = "the test"

    with pytest.raises(Interrupted, match="Stopped by the test"):
        run(config, stop=stop, notify=stop_in_the_second_round)
    assert not (Path(config.out) / "encoder.safetensors").exists()
    run(config)
    assert (Path(config.out) / "encoder.safetensors").exists()


def test_a_stop_does_not_wait_for_the_end_of_a_task(config: Config) -> None:
    long = config.training.model_copy(update={"max_epochs": 100_000, "patience": 100_000})
    stop = StopFlag()

    def stop_in_the_first_stage(event: Event) -> None:
        if isinstance(event, StageStarted):
            stop.reason = "the test"

    with pytest.raises(Interrupted, match="Stopped by the test"):
        run(config.model_copy(update={"training": long}), stop=stop, notify=stop_in_the_first_stage)
    state = RunState.load(RunStore.of(config.out, config.cache.dir).round(1, 2).state)
    assert state.record(1).status == "training"


def test_what_cannot_be_done_ends_the_run(config: Config) -> None:
    training = config.training.model_copy(update={"lr": 1e30})
    with pytest.raises(TrainingError, match="lower --lr"):
        run(config.model_copy(update={"training": training}))


def test_a_scheduler_that_is_not_there_is_named(
    tiny_speech: Tiny, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.engines.dask.ANSWER_SECONDS", 1)
    nowhere = tiny_speech(f"fsdd:{digits}", **ROUNDS, **{"engine.scheduler": "tcp://127.0.0.1:9"})
    with pytest.raises(ConfigError, match=r"--scheduler tcp://127.0.0.1:9: no Dask scheduler answers"):
        run(nowhere)

"""Worker processes: the same bits as one process, whoever dies."""

import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from forked_python import ForkedPython
from safetensors.numpy import load_file

from layerwise.config import Config, resolve, with_options
from layerwise.engines.run import RunResult, UserObjects, run
from layerwise.errors import ConfigError, Interrupted, RunError, TrainingError
from layerwise.events import EpochDone, Event, Message, StageStarted
from layerwise.nets import build_network
from layerwise.stop import StopFlag
from layerwise.training.schedule import tasks_of_run

Tiny = Callable[..., Config]
ROUNDS = {"training.rounds": 2, "training.max_epochs": 4}
TWO = {"engine.devices": "cpu,cpu"}


def bits(out: str | Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(Path(out) / "encoder.safetensors").items()}


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forks of this process."""
    monkeypatch.setattr(subprocess, "Popen", ForkedPython)


def workers() -> list[psutil.Process]:
    """Fresh interpreters, or forks of this one."""
    ours, fresh = psutil.Process().cmdline(), "layerwise.engines.worker"
    return [child for child in psutil.Process().children() if child.cmdline() == ours or fresh in child.cmdline()]


@pytest.fixture
def config(tiny_speech: Tiny, digits: Path) -> Config:
    return tiny_speech(f"fsdd:{digits}", **ROUNDS, **TWO)


@pytest.fixture
def alone(tiny_speech: Tiny, digits: Path, tmp_path: Path, finished: Callable[[Config], RunResult]) -> dict[str, bytes]:
    """The bits of the same run in one process."""
    other = tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "alone"), **ROUNDS)
    finished(other)
    return bits(other.out)


def test_two_processes_end_with_the_bits_of_one_and_tell_what_they_do(config: Config, alone: dict[str, bytes]) -> None:
    events: list[Event] = []
    run(config, notify=events.append)
    assert bits(config.out) == alone
    begun = {(event.round, event.stage) for event in events if isinstance(event, StageStarted)}
    assert begun == {(task.round, task.stage) for task in tasks_of_run(4, 2)}
    assert not workers()


@pytest.mark.usefixtures("forked")
def test_a_worker_that_is_killed_is_replaced(config: Config, alone: dict[str, bytes]) -> None:
    events: list[Event] = []

    def kill_the_second_time(event: Event) -> None:
        events.append(event)
        if sum(isinstance(each, EpochDone) for each in events) == 5 and isinstance(event, EpochDone):
            workers()[0].send_signal(signal.SIGKILL)

    run(config, notify=kill_the_second_time)
    assert bits(config.out) == alone
    told = [event.text for event in events if isinstance(event, Message)]
    assert any("was killed by signal 9; another takes its place" in text for text in told)


@pytest.mark.usefixtures("forked")
def test_a_stop_reaches_the_workers_and_the_same_command_goes_on(config: Config, alone: dict[str, bytes]) -> None:
    stop = StopFlag()

    def stop_in_the_second_round(event: Event) -> None:
        if isinstance(event, StageStarted) and event.round == 2:
            stop.reason = "the test"

    with pytest.raises(Interrupted, match="Stopped by the test"):
        run(config, stop=stop, notify=stop_in_the_second_round)
    assert not workers()
    run(config)
    assert bits(config.out) == alone


@pytest.mark.usefixtures("forked")
def test_a_run_that_is_killed_leaves_no_workers(config: Config, alone: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(config.to_toml())
    command = [sys.executable, "-m", "layerwise", "run", "--config", str(tmp_path / "own.toml")]
    coordinator = psutil.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(Path(config.out).rglob("checkpoint.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.1)
    orphans = coordinator.children()
    coordinator.kill()
    coordinator.wait()
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert len(orphans) == 2
    assert not alive
    logs = [path.read_text() for path in Path(config.out).glob("workers/*.txt")]
    assert not any("Traceback" in log for log in logs), logs
    run(config)
    assert bits(config.out) == alone


@pytest.mark.usefixtures("forked")
def test_a_task_whose_workers_die_three_times_ends_the_run(config: Config) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, StageStarted):
            workers()[0].kill()

    with pytest.raises(
        RunError, match=r"Stage 1 in round 1 has failed 3 times; the last worker was killed by signal 9"
    ):
        run(with_options(config, {"engine.devices": "cpu"}), notify=kill)
    assert not workers()


@pytest.mark.usefixtures("forked")
def test_what_cannot_be_done_is_not_tried_again(config: Config) -> None:
    events: list[Event] = []
    with pytest.raises(TrainingError, match="lower --lr"):
        run(with_options(config, {"training.lr": 1e30}), notify=events.append)
    assert sum(isinstance(event, StageStarted) for event in events) == 1


def test_what_processes_cannot_share_is_refused(config: Config, tiny_speech: Tiny) -> None:
    with pytest.raises(ConfigError, match="was given as an object"):
        run(config, UserObjects(build_network(config.net, (1,))))
    with pytest.raises(ConfigError, match=r"'gpu' is no device"):
        tiny_speech("demo", **{"engine.devices": "gpu"})
    assert not Path(config.out).exists()


def test_workers_find_a_network_in_the_present_folder_and_look_for_all_else_before(
    forked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    np.save("streams.npy", np.random.default_rng(0).standard_normal((12, 30, 3)).astype(np.float32))
    Path("net_of_workers.py").write_text(
        "import os, pathlib, sys\nfrom torch import nn\n"
        "def make(shape):\n"
        "    pathlib.Path(f'searched-{os.getpid()}').write_text('\\n'.join(sys.path))\n"
        "    return nn.Linear(shape[0], 4)\n"
    )
    small = {"data.window": 12, "objective.steps": 2, "training.batch_size": 4, "training.max_epochs": 1}
    named = {"net.name": "net_of_workers:make", "data.source": "npy:streams.npy", "data.frames": "steps"}
    run(resolve(overrides={**named, **small, "engine.devices": "cpu"}))
    searched = [path.read_text().splitlines() for path in tmp_path.glob("searched-*")]
    assert len(searched) == 2  # here and in the worker
    for folders in searched:
        assert folders.index(str(tmp_path)) > folders.index(sysconfig.get_path("stdlib"))

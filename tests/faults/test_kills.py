"""Real processes, really killed: the next start ends with the bits of a run that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_python import ForkedPython
from safetensors.numpy import load_file

from layerwise.config import Config, resolve

OPTIONS = {
    "net.width": 16,
    "net.context": 16,
    "net.kernels": [10, 8],
    "net.strides": [5, 4],
    "net.paddings": [2, 2],
    "objective.steps": 3,
    "objective.anchors": 32,
    "data.sample_rate": 8000,
    "data.window": 1600,
    "training.max_epochs": 8,
    "training.batch_size": 4,
    "training.checkpoint_seconds": 0.02,
    "cache.block": 512,
}


@pytest.fixture
def start(tmp_path: Path, digits: Path, plan_ahead: Callable[[Config], None]) -> Callable[..., subprocess.Popen]:
    """start(folder, python=ForkedPython) begins or resumes a run there, in a process of its own."""
    plan_ahead(resolve(overrides={**OPTIONS, "data.source": f"fsdd:{digits}"}))
    sets = [word for key, value in OPTIONS.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin(folder: str, python: type[subprocess.Popen] = ForkedPython) -> subprocess.Popen:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "layerwise", "run", "--data", f"fsdd:{digits}", *sets, "--out", "run"]
        return python(
            command, cwd=tmp_path / folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return begin


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, f"ended before it could be disturbed: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def bits(folder: Path) -> dict[str, bytes]:
    weights = {name: value.tobytes() for name, value in load_file(folder / "run" / "encoder.safetensors").items()}
    return weights | {path.name: path.read_bytes() for path in (folder / "cache" / "run").glob("*.h5")}


def test_killed_in_a_stage_and_in_a_cache_a_run_ends_with_the_same_bits(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    finish(start("undisturbed"))
    run, caches = tmp_path / "killed" / "run", tmp_path / "killed" / "cache" / "run"

    process = start("killed")
    wait_for((run / "stages" / "1" / "checkpoint.safetensors").exists, process)
    process.kill()
    process.communicate()
    assert not (caches / "stage-1.h5").exists()

    journal = caches / "stage-1.h5.journal"
    process = start("killed")
    wait_for(lambda: journal.exists() and journal.stat().st_size >= 4 * 16, process)
    process.kill()
    process.communicate()
    assert (caches / "stage-1.h5.part").exists()

    process = start("killed")
    wait_for((run / "stages" / "3" / "checkpoint.safetensors").exists, process)
    process.kill()
    process.communicate()

    finish(start("killed"))
    assert bits(tmp_path / "killed") == bits(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("number", "python"),
    [(signal.SIGTERM, subprocess.Popen), (signal.SIGUSR1, ForkedPython), (signal.SIGINT, ForkedPython)],
)
def test_a_signal_saves_exits_75_and_the_same_command_goes_on(
    start: Callable[..., subprocess.Popen], tmp_path: Path, number: signal.Signals, python: type[subprocess.Popen]
) -> None:
    process = start("stopped", python=python)
    wait_for((tmp_path / "stopped" / "run" / "stages" / "1" / "checkpoint.safetensors").exists, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"Stopped by {number.name}" in err
    assert "start the same command again" in err
    assert "Traceback" not in err
    assert "going on in epoch" in finish(start("stopped"))

"""Networks and data that the command line names, from the plan to the loaded encoder."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_python import ForkedPython
from PIL import Image
from safetensors.numpy import load_file

import layerwise

MINE = """
import numpy as np
import torch
from torch import nn

def network(frame_shape):
    return nn.Sequential(nn.Conv1d(frame_shape[0], 8, 5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6))

def sized(frame_shape):
    return nn.Sequential(nn.Conv1d(frame_shape[0], 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 6))

def data():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((80, 3)), f"kind {n % 2}") for n in range(16)]
"""

Call = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """call(*arguments): the command line in a folder that holds mine.py."""
    monkeypatch.setattr(subprocess, "Popen", ForkedPython)
    (tmp_path / "mine.py").write_text(MINE)

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "layerwise", *map(str, arguments)]
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=quiet)

    return run


def bits(out: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(out / "encoder.safetensors").items()}


FRAMED = ("--frames", "steps", "--set", "data.frame_length=8", "--set", "data.frame_step=4", "--set", "data.window=12")
SMALL = ("--max-epochs", 2, "--batch-size", 4, "--set", "objective.steps=2", "--set", "objective.negatives=3")


def test_functions_of_the_users_own_give_the_same_bits_in_worker_processes(call: Call, tmp_path: Path) -> None:
    asked = ("run", "--net", "mine:sized", "--data", "mine:data", *FRAMED, *SMALL, "--stages", 2)
    alone = call(*asked, "--out", "alone")
    assert alone.returncode == 0, alone.stderr
    workers = call(*asked, "--out", "workers", "--devices", "cpu,cpu")
    assert workers.returncode == 0, workers.stderr
    assert bits(tmp_path / "alone") == bits(tmp_path / "workers")
    refused = call("probe", "alone", "--label", "label")
    assert (refused.returncode, "--net mine:sized" in refused.stderr) == (2, True)
    printed = next(line.split() for line in alone.stdout.splitlines() if line.startswith("  layerwise probe"))
    assert call(*printed[1:]).returncode == 0
    refused = call("export", "alone", "-o", "exported")
    assert (refused.returncode, "--net mine:sized" in refused.stderr) == (2, True)
    assert call("export", "alone", "-o", "exported", "--net", "mine:sized").returncode == 0
    extracted = call("extract", "alone", "mine:data", "--net", "mine:sized", "-o", "features.npy")
    assert extracted.returncode == 0, extracted.stderr
    assert np.load(tmp_path / "features.npy").shape == (16 * 19, 6)


def test_an_array_of_another_level_is_read_at_that_of_the_run(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((12, 30, 3)).astype(np.float32)
    small = {"data.window": 12, "objective.steps": 2, "cache.dir": str(tmp_path / "cache")}
    model, out = torch.nn.Linear(3, 4), tmp_path / "run"
    layerwise.run(model, values, frames="steps", max_epochs=1, batch_size=4, out=str(out), options=small)
    np.save(tmp_path / "loud.npy", 100 * values)
    layerwise.extract(out, tmp_path / "loud.npy", tmp_path / "features.npy", network=model)
    expected = layerwise.load(out, network=model)(torch.from_numpy(100 * values)).detach().numpy()
    assert np.allclose(np.load(tmp_path / "features.npy").reshape(12, 30, 4), expected, rtol=2e-3, atol=0.1)


def test_layers_that_do_not_know_their_size_yet_are_named(call: Call, tmp_path: Path) -> None:
    done = call("run", "--net", "mine:network", "--data", "mine:data", *FRAMED, *SMALL)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'3' (LazyLinear)" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixteen pictures of two classes."""
    rng = np.random.default_rng(0)
    for number in range(16):
        path = tmp_path / "pictures" / ("dark" if number % 2 else "light") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (40, 48, 3)) + (0 if number % 2 else 120)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.mark.usefixtures("half_resnet")
def test_a_torchvision_network_is_cut_by_the_budget_trained_resumed_exported_and_loaded(
    call: Call, pictures: Path, tmp_path: Path
) -> None:
    size = ("--set", "data.picture=32", "--batch-size", 8, "--max-epochs", 1)
    asked = ("--net", "torchvision:resnet18", "--data", "images:pictures", *size)
    asked += ("--gpu-mem", "30MB", "--stages", "fewest")
    command = [sys.executable, "-m", "layerwise", "run", *map(str, asked), "--out", "run"]
    stopped = subprocess.Popen(command, cwd=tmp_path)
    while not (tmp_path / "run" / "stages" / "1" / "weights.safetensors").exists() and stopped.poll() is None:
        time.sleep(0.002)
    stopped.terminate()
    assert stopped.wait(timeout=100) == 75
    resumed = call("run", *asked, "--out", "run")
    assert resumed.returncode == 0, resumed.stderr
    undisturbed = call("run", *asked, "--out", "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    assert call("export", "run", "-o", "exported").returncode == 0
    batch = torch.rand(2, 3, 32, 32)
    encoder, exported = (layerwise.load(tmp_path / name) for name in ("run", "exported"))
    assert encoder(batch).shape == (2, 1, 512)
    assert torch.equal(encoder(batch), exported(batch))
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 1 < len(state["stages"]) < 10
    assert max(stage["peak_bytes"] for stage in state["stages"]) <= 30e6

"""`--engine slurm`: a run as dependent jobs of a real Slurm."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from forked_python import ForkedPython
from safetensors.numpy import load_file

import layerwise
from layerwise.config import Config
from layerwise.engines.run import run

Tiny = Callable[..., Config]
OPTIONS = {
    "net.kernels": [10, 8, 4],
    "net.strides": [5, 4, 2],
    "net.paddings": [2, 2, 1],  # three stages
    "training.max_epochs": 24,
    "training.patience": 24,
    "training.checkpoint_seconds": 0,
    "training.device": "cpu",
}


@pytest.fixture
def hand_in(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """hand_in(environment, *options): `layerwise run --engine slurm` of a tiny network, into tmp_path/run."""
    (tmp_path / "own.toml").write_text(tiny_speech(f"fsdd:{digits}", **OPTIONS).to_toml())
    package = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(layerwise.__file__).parents[1])}

    def hand_in(environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "layerwise", "run", "--config", "own.toml", "--engine", "slurm", *options]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = ForkedPython(command, cwd=tmp_path, env=os.environ | environment | package, **streams)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return hand_in


def bits(path: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(path / "encoder.safetensors").items()}


def test_three_stages_as_dependent_jobs_one_of_them_preempted_end_with_the_bits_of_one_process(
    slurm: Cluster,
    hand_in: Callable[..., subprocess.CompletedProcess[str]],
    tiny_speech: Tiny,
    digits: Path,
    tmp_path: Path,
) -> None:
    run(tiny_speech(f"fsdd:{digits}", out=str(tmp_path / "alone"), **OPTIONS))
    done = hand_in(slurm.environment)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"^job (\d+): round 1, stage (\d)", done.stdout, re.MULTILINE)
    assert [stage for _, stage in jobs] == ["1", "2", "3"]
    second = jobs[1][0]

    checkpoint, deadline = tmp_path / "run" / "stages" / "2" / "checkpoint.safetensors", time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    slurm.call("scancel", "--signal=TERM", second)
    again = hand_in(slurm.environment)
    assert again.returncode == 2
    assert "Jobs of an earlier start are still queued" in again.stderr
    slurm.start_again(second)
    for job, _ in jobs:
        slurm.wait(job, ["COMPLETED"], seconds=120)
    assert "going on in epoch" in (tmp_path / "run" / "jobs" / "round-1-stage-2.txt").read_text()
    assert bits(tmp_path / "run") == bits(tmp_path / "alone")
    assert "done before" in hand_in(slurm.environment).stdout


def test_a_dry_run_prints_the_scripts_and_leaves_nothing(
    hand_in: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    options = ("--dry-run", "--rounds", "2", "--partition", "small", "--time", "2h", "--device", "auto")
    done = hand_in({}, *options, "--set", "engine.sbatch=['--account=physics']")
    assert done.returncode == 0, done.stderr
    scripts = done.stdout.split("#!/bin/bash")[1:]
    assert len(scripts) == 6
    for line in ("--partition=small", "--time=0-02:00:00", "--gres=gpu:1", "--account=physics", "--requeue"):
        assert all(f"#SBATCH {line}" in script for script in scripts)
    assert "# round 2, stage 2; after round 1 stage 2, round 2 stage 1" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_dry_run_is_for_batch_jobs(hand_in: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = hand_in({}, "--dry-run", "--engine", "local")
    assert done.returncode == 2
    assert "give --engine slurm, too" in done.stderr

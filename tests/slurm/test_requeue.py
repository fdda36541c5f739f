"""Runs as real batch jobs: what becomes of them when they are signalled, preempted and cancelled.

One of them trains. In the others the command is the real one, and in place of the training it waits to be stopped.
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from safetensors.numpy import load_file

import layerwise
from layerwise.config import resolve
from layerwise.engines.run import run

OPTIONS = {"net.context": 0, "training.max_epochs": 8, "training.patience": 8, "training.checkpoint_seconds": 0}


WAITING = """\
import contextlib, os, sys, time, types
from pathlib import Path

from layerwise.run_store import RunState, StageRecord

def wait_to_be_stopped(config, *, stop, **_):
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        sys.exit(0)
    Path(config.out).mkdir()
    RunState([StageRecord(1)], config, "data", None, "cpu", "cache", 1, [1]).save(Path(config.out) / "run.json")
    Path("begun").touch()
    while not stop.reason:
        time.sleep(0.02)
    stop.raise_if_set("while it waited")

ranks = types.SimpleNamespace(first=True)
sys.modules["layerwise.engines.run"] = types.SimpleNamespace(run=wait_to_be_stopped)
sys.modules["layerwise.engines.torchrun"] = types.SimpleNamespace(
    join_ranks=lambda _: contextlib.nullcontext(ranks), is_restart=lambda: False, leave=lambda _: None
)

from layerwise.commands import main

main(sys.argv[1:])
"""
"""`layerwise` without torch: a run that waits, and is done when Slurm starts it again."""


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path) -> Callable[..., str]:
    """submit(*program) gives the number of a job that starts `program run` in tmp_path, and may be queued again."""

    def submit_run(*program: str) -> str:
        script = tmp_path / "job.sh"
        script.write_text(
            "#!/bin/sh\n"
            "#SBATCH --requeue --open-mode=append --signal=USR1@120\n"
            f"export OMP_NUM_THREADS=1 PYTHONPATH={shlex.quote(str(Path(layerwise.__file__).parents[1]))}\n"
            f"srun {shlex.join([sys.executable, *program])}\n"
        )
        return slurm.submit(script)

    return submit_run


@pytest.fixture
def waiting(slurm: Cluster, submit: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """waiting() gives the number of a job whose run in tmp_path/run waits to be stopped; waiting(KEY=value) updates it."""
    (tmp_path / "waiting.py").write_text(WAITING)

    def start(**updates: str) -> str:
        job = submit("waiting.py", "run", "--out", "run")
        if updates:
            slurm.call("scontrol", "update", f"JobId={job}", *(f"{key}={value}" for key, value in updates.items()))
        wait_for(tmp_path / "begun", slurm, job)
        return job

    return start


@pytest.fixture(scope="module")
def undisturbed(
    digits: Path, tiny_options: dict[str, dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The weights of the same run, done in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    places = {"data.source": f"fsdd:{digits}", "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
    return bits(run(resolve(overrides={**tiny_options["speech"], **OPTIONS, **places})).paths.encoder)


def bits(path: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(path).items()}


def wait_for(path: Path, slurm: Cluster, job: str) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert slurm.job(job)["JobState"] in ("PENDING", "RUNNING"), "it ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_that_is_stopped_goes_on_by_itself_to_the_same_bits(
    slurm: Cluster,
    submit: Callable[..., str],
    tmp_path: Path,
    digits: Path,
    tiny_options: dict[str, dict[str, object]],
    undisturbed: dict[str, bytes],
) -> None:
    assigned = [f"{key}={value}" for key, value in (tiny_options["speech"] | OPTIONS).items()]
    options = [word for each in assigned for word in ("--set", each)]
    job = submit("-m", "layerwise", "run", "--data", f"fsdd:{digits}", "--out", "run", *options)
    wait_for(tmp_path / "run" / "stages" / "2" / "checkpoint.safetensors", slurm, job)
    slurm.call("scancel", "--signal=TERM", job)
    slurm.start_again(job)
    ended = slurm.wait(job, ["COMPLETED"], seconds=100)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Stopped by SIGTERM" in log
    assert f"Slurm has queued job {job} again" in log
    assert "stage 2: going on in epoch" in log
    assert ended["Restarts"] == "1"
    assert bits(tmp_path / "run" / "encoder.safetensors") == undisturbed


@pytest.mark.parametrize(
    ("disturb", "said"),
    [(["scancel", "--signal=USR1"], "SIGUSR1"), (["scontrol", "requeue"], "SIGTERM")],
    ids=["at its time limit", "preempted"],
)
def test_a_job_that_is_stopped_is_queued_again_once(
    slurm: Cluster, waiting: Callable[..., str], tmp_path: Path, disturb: list[str], said: str
) -> None:
    job = waiting()
    slurm.call(*disturb, job)
    slurm.start_again(job)
    assert slurm.wait(job, ["COMPLETED"])["Restarts"] == "1"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"Stopped by {said}" in log
    assert f"Slurm has queued job {job} again" in log


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, waiting: Callable[..., str], tmp_path: Path) -> None:
    job = waiting()
    slurm.call("scancel", job)
    assert slurm.wait(job, ["CANCELLED"])["Restarts"] == "0"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Stopped by SIGTERM" in log
    assert f"Slurm is ending job {job} for good" in log


def test_a_job_that_may_not_be_requeued_says_so(slurm: Cluster, waiting: Callable[..., str], tmp_path: Path) -> None:
    job = waiting(Requeue="0")
    slurm.call("scancel", "--signal=TERM", job)
    assert slurm.wait(job, ["FAILED"])["ExitCode"] == "75:0"
    assert (
        f"Job {job} cannot be queued again (Requested operation is presently disabled"
        in (tmp_path / "run" / "log.txt").read_text()
    )


def test_a_person_who_stops_a_job_with_sigusr2_is_not_outvoted(slurm: Cluster, waiting: Callable[..., str]) -> None:
    job = waiting()
    slurm.call("scancel", "--signal=USR2", job)
    assert slurm.wait(job, ["FAILED"])["Restarts"] == "0"

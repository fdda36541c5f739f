"""Runs as real batch jobs: what becomes of them when they are signalled, preempted and cancelled."""

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

OPTIONS = {"training.max_epochs": 8, "training.patience": 8, "training.checkpoint_seconds": 0}


@pytest.fixture
def submit(
    slurm: Cluster, tmp_path: Path, digits: Path, tiny_options: dict[str, dict[str, object]]
) -> Callable[..., str]:
    """submit(*options) gives the number of a job that trains a tiny network in tmp_path/run."""

    def submit_run(*options: str) -> str:
        assigned = [f"{key}={value}" for key, value in (tiny_options["speech"] | OPTIONS).items()]
        command = [sys.executable, "-m", "layerwise", "run", "--data", f"fsdd:{digits}", "--out", "run"]
        command += [word for each in assigned for word in ("--set", each)] + list(options)
        script = tmp_path / "job.sh"
        script.write_text(
            "#!/bin/sh\n"
            "#SBATCH --requeue --open-mode=append --signal=USR1@120\n"
            f"export OMP_NUM_THREADS=1 PYTHONPATH={shlex.quote(str(Path(layerwise.__file__).parents[1]))}\n"
            f"srun {shlex.join(command)}\n"
        )
        return slurm.submit(script)

    return submit_run


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


@pytest.mark.parametrize(
    "disturb",
    [["scancel", "--signal=TERM"], ["scancel", "--signal=USR1"], ["scontrol", "requeue"]],
    ids=["terminated", "at its time limit", "preempted"],
)
def test_a_job_that_is_stopped_goes_on_by_itself_to_the_same_bits(
    slurm: Cluster, submit: Callable[..., str], tmp_path: Path, undisturbed: dict[str, bytes], disturb: list[str]
) -> None:
    job = submit()
    wait_for(tmp_path / "run" / "stages" / "2" / "checkpoint.safetensors", slurm, job)
    slurm.call(*disturb, job)
    slurm.start_again(job)
    ended = slurm.wait(job, ["COMPLETED"], seconds=100)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Stopped by SIG" in log
    assert f"Slurm has queued job {job} again" in log
    assert "stage 2: going on in epoch" in log
    assert ended["Restarts"] == "1"
    assert bits(tmp_path / "run" / "encoder.safetensors") == undisturbed


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit()
    wait_for(tmp_path / "run" / "stages" / "1" / "checkpoint.safetensors", slurm, job)
    slurm.call("scancel", job)
    assert slurm.wait(job, ["CANCELLED"])["Restarts"] == "0"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Stopped by SIGTERM" in log
    assert f"Slurm is ending job {job} for good" in log


def test_a_job_that_may_not_be_requeued_says_so(slurm: Cluster, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit()
    slurm.call("scontrol", "update", f"JobId={job}", "Requeue=0")
    wait_for(tmp_path / "run" / "stages" / "1" / "checkpoint.safetensors", slurm, job)
    slurm.call("scancel", "--signal=TERM", job)
    assert slurm.wait(job, ["FAILED"])["ExitCode"] == "75:0"
    assert (
        f"Job {job} cannot be queued again (Requested operation is presently disabled"
        in (tmp_path / "run" / "log.txt").read_text()
    )


def test_a_person_who_stops_a_job_with_sigusr2_is_not_outvoted(
    slurm: Cluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit()
    wait_for(tmp_path / "run" / "stages" / "1" / "checkpoint.safetensors", slurm, job)
    slurm.call("scancel", "--signal=USR2", job)
    assert slurm.wait(job, ["FAILED"])["Restarts"] == "0"

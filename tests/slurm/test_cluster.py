"""What the tests count on in the Slurm that they start."""

import time
from pathlib import Path

from cluster import Cluster


def batch(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    return path


def test_a_batch_job_runs_a_step_and_ends(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit(batch(tmp_path / "job.sh", "srun sh -c 'echo step $SLURM_STEP_ID of $SLURM_JOB_ID'"))
    slurm.wait(job, ["COMPLETED"])
    assert (tmp_path / "job.log").read_text() == f"step 0 of {job}\n"


def test_a_job_waits_for_the_one_that_it_depends_on(slurm: Cluster, tmp_path: Path) -> None:
    first = slurm.submit(batch(tmp_path / "first.sh", "sleep 2", "touch made"))
    second = slurm.submit(batch(tmp_path / "second.sh", "ls made"), f"--dependency=afterok:{first}")
    assert slurm.job(second)["JobState"] == "PENDING"
    slurm.wait(second, ["COMPLETED"])
    assert (tmp_path / "second.log").read_text() == "made\n"


def test_a_job_is_cancelled_when_the_one_that_it_depends_on_fails(slurm: Cluster, tmp_path: Path) -> None:
    first = slurm.submit(batch(tmp_path / "first.sh", "exit 3"))
    second = slurm.submit(
        batch(tmp_path / "second.sh", "true"), f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes"
    )
    slurm.wait(second, ["CANCELLED"])


def test_a_signal_reaches_the_step(slurm: Cluster, tmp_path: Path) -> None:
    step = "trap 'echo told; exit 0' TERM; touch ready; while true; do sleep 0.1; done"
    job = slurm.submit(batch(tmp_path / "job.sh", f'srun sh -c "{step}"'))
    wait_for(tmp_path / "ready", slurm, job)
    slurm.call("scancel", "--signal=TERM", job)
    slurm.wait(job, ["COMPLETED"])
    assert "told" in (tmp_path / "job.log").read_text()


def test_a_job_that_requeues_itself_starts_again(slurm: Cluster, tmp_path: Path) -> None:
    lines = ("echo restarts ${SLURM_RESTART_COUNT:-0}", "[ $SLURM_RESTART_COUNT ] && exit 0")
    script = batch(tmp_path / "job.sh", *lines, "srun scontrol requeue $SLURM_JOB_ID", "sleep 60")
    job = slurm.submit(script, "--requeue", "--open-mode=append")
    slurm.start_again(job)
    assert slurm.wait(job, ["COMPLETED"])["Restarts"] == "1"
    log = (tmp_path / "job.log").read_text()
    assert "restarts 0" in log and "restarts 1" in log


def test_jobs_run_side_by_side(slurm: Cluster, tmp_path: Path) -> None:
    numbers = [slurm.submit(batch(tmp_path / f"{number}.sh", "sleep 30")) for number in range(2)]
    for number in numbers:
        slurm.wait(number, ["RUNNING"], seconds=20)
    slurm.call("scancel", *numbers)


def wait_for(path: Path, slurm: Cluster, job: str) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, slurm.job(job)
        time.sleep(0.05)

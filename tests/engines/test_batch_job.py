"""When a stopped run asks Slurm for a restart, and what it says when it gets none. The real Slurm: tests/slurm."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from layerwise.engines import requeue as batch_job
from layerwise.engines.requeue import BatchJob, queue_again, this_job
from layerwise.run_store import RunStore


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, BatchJob("12", 0)),
        ({"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": "3"}, BatchJob("12", 3)),
        ({"SLURM_JOB_ID": "12", "SLURM_PROCID": "1"}, None),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2"}, BatchJob("12_2", 0)),
    ],
)
def test_the_job_is_found_by_its_first_process(environment: dict[str, str], job: BatchJob | None) -> None:
    assert this_job(environment) == job


RUNNING = "JobId=12 JobName=my job JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1 ExitCode=0:0"


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], list[str]]]:
    """ask(state, requeue="true", reason="SIGTERM") gives what scontrol was told, and the lines that were said.

    state: the answer of `scontrol show job`, or several, one for each time; requeue: the shell that
    `scontrol requeue` is.
    """
    words, answers = tmp_path / "words", tmp_path / "answers"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for name in ("SLURM_PROCID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(batch_job, "END_SECONDS", 0.3)

    def asked(*states: str, requeue: str = "true", reason: str | None = "SIGTERM") -> tuple[list[str], list[str]]:
        answers.write_text("".join(f"{state}\n" for state in states))
        program = tmp_path / "scontrol"
        program.write_text(
            f"#!/bin/sh\necho $* >> {words}\n"
            f"[ $1 = show ] && {{ head -1 {answers}; sed -i 1d {answers}; exit 0; }}\n{requeue}\n"
        )
        program.chmod(0o755)
        said: list[str] = []
        queue_again(reason, RunStore.of(tmp_path / "run", tmp_path / "cache"), said.append)
        return words.read_text().splitlines() if words.exists() else [], said

    return asked


SHOW, REQUEUE = "show job --oneliner 12", "requeue 12"


def test_a_running_job_is_queued_again(ask: Callable) -> None:
    told, said = ask(RUNNING)
    assert told == [SHOW, REQUEUE]
    assert said == ["Slurm has queued job 12 again; it will go on by itself."]


@pytest.mark.parametrize("reason", ["SIGUSR1", "--time 2h"])
def test_so_it_is_before_its_time_is_over(ask: Callable, reason: str) -> None:
    assert ask(RUNNING, reason=reason)[0] == [SHOW, REQUEUE]


def test_so_it_is_after_its_time_is_over(ask: Callable) -> None:
    state = RUNNING.replace("RUNNING Reason=None", "COMPLETING Reason=TimeLimit")
    assert ask(state)[0] == [SHOW, REQUEUE]


@pytest.mark.parametrize("reason", ["SIGINT", "SIGUSR2"])
def test_a_person_who_stops_it_has_the_last_word(ask: Callable, reason: str) -> None:
    assert ask(RUNNING, reason=reason) == ([], [])


def test_a_cancelled_job_stays_away(ask: Callable) -> None:
    told, said = ask(RUNNING.replace("RUNNING", "COMPLETING"))
    assert told == [SHOW]
    assert said == ["Slurm is ending job 12 for good, as scancel does; it is not queued again."]


def test_a_job_that_slurm_has_queued_already_is_left_to_it(ask: Callable) -> None:
    told, said = ask(RUNNING.replace("RUNNING", "COMPLETING").replace("Restarts=0", "Restarts=1"))
    assert told == [SHOW]
    assert said == ["Slurm has queued job 12 again; it will go on by itself."]


def test_where_somebody_waits_for_the_command_nothing_is_queued(ask: Callable) -> None:
    assert ask(RUNNING.replace("BatchFlag=1", "BatchFlag=0")) == ([SHOW], [])


def test_a_refusal_is_given_in_slurms_words(ask: Callable) -> None:
    _, said = ask(RUNNING, RUNNING, requeue="echo 'Requested operation is presently disabled for job 12' >&2; exit 1")
    assert said == [
        "Job 12 cannot be queued again (Requested operation is presently disabled for job 12); "
        "submit it anew, with sbatch --requeue."
    ]


def test_a_requeue_that_was_killed_by_what_it_asked_for_has_succeeded(ask: Callable) -> None:
    after = RUNNING.replace("RUNNING", "COMPLETING").replace("Restarts=0", "Restarts=1")
    _, said = ask(RUNNING, after, requeue="kill -TERM $$")
    assert said == ["Slurm has queued job 12 again; it will go on by itself."]


def test_without_scontrol_it_says_so(ask: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert ask(RUNNING)[1] == [
        "Job 12 cannot be queued again (there is no scontrol on the PATH of this node); "
        "submit it anew, with sbatch --requeue."
    ]


def test_an_answer_that_means_nothing_is_said(ask: Callable) -> None:
    assert "cannot be understood" in ask("slurm_load_jobs")[1][0]


def test_the_wait_ends_with_the_next_signal(ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_job, "END_SECONDS", 60)
    began, before = time.monotonic(), signal.signal(signal.SIGTERM, lambda *_: None)
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        timer.start()
        assert ask(RUNNING)[0] == [SHOW, REQUEUE]
        timer.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 30

"""Batch scripts for Slurm, submitting them, and asking Slurm for jobs that are still queued.

Slurm's commands may be missing, and may not answer where its controller is down.
"""

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from layerwise.config.options import EngineOptions
from layerwise.errors import RunError, SlurmError
from layerwise.records import STRICT, read_record
from layerwise.units import seconds

WARNING_SECONDS = 120
"""How long before the end of its time a job is told, so that it saves and is queued again."""


def script(name: str, command: Sequence[str], log: Path, options: EngineOptions) -> str:
    """The text of a batch script that runs the command as one task, and may be started again at any time.

    name: of the job. log: takes the output of all starts, one after the other; its folder must exist, for without it Slurm
    fails the job and says nothing. options: what the job asks of the cluster; the cluster's own default where nothing is said.
    Raises SlurmError where an option has several lines.
    """
    asked = [
        f"--job-name={name}",
        f"--output={str(log).replace('%', '%%')}",  # % begins what Slurm fills in
        "--open-mode=append",
        "--requeue",
        f"--signal=USR1@{WARNING_SECONDS}",
        "--nodes=1",
        "--ntasks=1",
    ]
    if options.partition:
        asked.append(f"--partition={options.partition}")
    if options.time:
        asked.append(f"--time={_slurm_time(seconds(options.time))}")
    if options.gpus:
        asked.append(f"--gres=gpu:{options.gpus}")
    asked += options.sbatch  # last, so that they win
    broken = next((each for each in asked if "\n" in each), None)
    if broken:
        raise SlurmError(
            f"The option {broken!r} has more than one line, which no batch script can hold; write it in one."
        )
    # srun, because Slurm's warning goes to steps and not to the script; exec, so that no shell dies of a signal first.
    lines = ["#!/bin/bash", *(f"#SBATCH {shlex.quote(each)}" for each in asked), f"exec srun {shlex.join(command)}"]
    return "\n".join(lines) + "\n"


def submit(script_path: Path, after: Sequence[str] = ()) -> str:
    """Hands the script in and gives the number of the job.

    after: jobs that must have ended well before it is started; where one of them fails, this one is cancelled. Raises
    SlurmError with sbatch's own words.
    """
    dependency = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    try:
        done = ask_slurm(["sbatch", "--parsable", *dependency, str(script_path)])
    except NoCommand:
        raise SlurmError(
            f"There is no sbatch on the PATH, so {script_path} cannot be handed in; do it where Slurm is installed."
        ) from None
    except NoAnswer as error:
        raise SlurmError(f"{error}, so {script_path} may not have been handed in; look with squeue.") from None
    if done.returncode:
        raise SlurmError(
            f"sbatch does not take {script_path}: {_words(done.stderr)}; mend that and start the same command again."
        )
    return done.stdout.strip().partition(";")[0]  # behind it stands the cluster, where there are several


def _words(complaint: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in complaint.strip().splitlines()]
    return " ".join(lines).rstrip(".") or "it does not say why"


def _slurm_time(length: float) -> str:
    """Seconds as D-HH:MM:SS."""
    minutes, second = divmod(round(length), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02d}:{minute:02d}:{second:02d}"


ANSWER_SECONDS = 60
"""Longest wait for an answer of Slurm's."""


class NoCommand(SlurmError):
    """The command is not on the PATH."""


class NoAnswer(SlurmError):
    """The command has not answered in time; what it was to do may be done or not."""


def ask_slurm(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The command when it has ended, well or not. Raises NoCommand, NoAnswer; callers say what follows from it."""
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        raise NoCommand(f"there is no {command[0]} on the PATH") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} has not answered for {ANSWER_SECONDS} s") from None


QUEUE = "jobs.json"
"""Beside the scripts: a `Queue`."""


@dataclass(frozen=True, slots=True)
class Queue:
    """The jobs that were handed in last."""

    __pydantic_config__ = STRICT

    numbers: list[Annotated[str, Field(pattern=r"^\d+(_\d+)?$")]]


def refuse_while_queued(folder: Path) -> None:
    """Raises RunError where jobs of the run are queued or at work, SlurmError where Slurm does not say.

    folder: of its batch scripts. Where there is no Slurm, as behind a copy to another machine, there are none.
    """
    numbers = read_record(Queue, folder / QUEUE).numbers if (folder / QUEUE).exists() else []
    if not numbers:
        return
    asked = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(numbers)}"]
    try:
        answer = ask_slurm(asked)
    except NoCommand:
        return
    except NoAnswer as error:
        raise SlurmError(f"{error}; try again when Slurm is back.") from None
    # Of a single job that it has forgotten Slurm says so as an error, of several it lists those that it knows.
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise SlurmError(f"squeue does not say whether jobs are queued: {answer.stderr.strip()}; try again later.")
    if queued := answer.stdout.split():
        raise RunError(
            f"Jobs of an earlier start are still queued: {', '.join(queued)}. Let them work, or end them first with: "
            f"scancel {' '.join(queued)}."
        )

"""Queues a batch job of Slurm again when the cluster stops it, unless its restarts get the run nowhere.

Slurm calls a job that exits with 75 failed and forgets it. So the job asks for its restart while it is still running and
everything is saved, and Slurm then ends it. Someone who cancels a job wants it to stay away: Slurm marks the job before it
sends the same SIGTERM, so the job's state tells the two apart. restarts.json in the run directory says where the run stood.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from layerwise.engines.sbatch import NoAnswer, NoCommand, ask_slurm
from layerwise.errors import RunError, SlurmError, UnreadableFile
from layerwise.files import check_readable
from layerwise.run_store import Restarts, RunStore
from layerwise.stop import stop_on_signals

BY_A_PERSON = ("SIGINT", "SIGUSR2")
"""Reasons of a stop that is meant to last."""

END_SECONDS = 600
"""Longest wait for Slurm to end a job that it has queued again."""


@dataclass(frozen=True, slots=True)
class BatchJob:
    """The job that this process belongs to."""

    number: str
    """As scontrol takes it: 12, or 12_3 for a task of an array."""
    restarts: int
    """How often Slurm had started it again before this start."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What Slurm says of a job."""

    name: str
    """RUNNING, COMPLETING and so on."""
    reason: str
    restarts: int
    batch: bool
    """Whether a script is run, rather than a shell or a command that somebody waits for."""

    @property
    def ends_for_good(self) -> bool:
        """Cancelled, or over; the end of its time is one that a restart mends."""
        return self.name != "RUNNING" and self.reason != "TimeLimit"


def this_job(environment: Mapping[str, str]) -> BatchJob | None:
    """The job of this process where there is one, and where this is the process of it that acts for all."""
    if not environment.get("SLURM_JOB_ID") or environment.get("SLURM_PROCID", "0") != "0":
        return None
    # The first task of an array has the array's own number, which would mean all of its tasks.
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    number = f"{array}_{task}" if array and task else environment["SLURM_JOB_ID"]
    restarts = environment.get("SLURM_RESTART_COUNT", "")
    return BatchJob(number, int(restarts) if restarts.isdigit() else 0)


def queue_again(stopped_by: str | None, store: RunStore, say: Callable[[str], None]) -> None:
    """Has Slurm start this job again, and waits until it ends this start; nothing outside of a batch job.

    stopped_by: the reason of the stop; one that a person asked for stands. say: takes a line for the log. Returns where Slurm
    cannot or should not start the job again, having said why. Raises RunError where restarts get the run nowhere.
    """
    job = this_job(os.environ)
    if job is None or stopped_by in BY_A_PERSON:
        return
    with stop_on_signals() as second:  # Slurm's next SIGTERM says that it has begun to end this start
        try:
            state = state_of(job)
            if not state.batch:
                return
            if state.restarts > job.restarts:
                say(f"Slurm has queued job {job.number} again; it will go on by itself.")
                return
            if state.ends_for_good:
                say(f"Slurm is ending job {job.number} for good, as scancel does; it is not queued again.")
                return
            count_restart(store, job.restarts)
            try:
                _scontrol(job, "requeue", job.number)
            except SlurmError:
                # Slurm ends all processes of the job as soon as it has queued it, scontrol among them.
                if state_of(job).restarts <= job.restarts:
                    raise
        except SlurmError as error:
            say(str(error))
            return
        say(f"Slurm has queued job {job.number} again; it will go on by itself.")
        deadline = time.monotonic() + END_SECONDS
        while not second.reason and time.monotonic() < deadline:
            time.sleep(0.1)


def state_of(job: BatchJob) -> JobState:
    """Raises SlurmError."""
    words = _scontrol(job, "show", "job", "--oneliner", job.number).split()
    said = {key: value for key, _, value in (word.partition("=") for word in words)}
    try:
        return JobState(said["JobState"], said["Reason"], int(said["Restarts"]), said["BatchFlag"] != "0")
    except (KeyError, ValueError):
        raise SlurmError(
            f"What scontrol says of job {job.number} cannot be understood, so it is not queued again; submit it anew."
        ) from None


def _scontrol(job: BatchJob, *words: str) -> str:
    try:
        done = ask_slurm(["scontrol", *words])
    except NoCommand as error:
        why = f"{error} of this node"
    except NoAnswer as error:
        why = str(error)
    else:
        if done.returncode == 0:
            return done.stdout
        why = done.stderr.strip() or f"scontrol ended with {done.returncode}"
    raise SlurmError(f"Job {job.number} cannot be queued again ({why}); submit it anew, with sbatch --requeue.")


MOST = 3
"""Starts in a row that may end where they began."""


def count_restart(store: RunStore, restarts: int) -> None:
    """Notes where the run stands; to be called when a start has been stopped and the job is about to be queued again.

    restarts: how often the job was started again before; at 0 a person has submitted it, and counting begins. Raises RunError
    where MOST starts in a row got nowhere.
    """
    if not store.exists:
        # Nothing is noted in a folder that is not a run's yet; Slurm's own count must do.
        in_vain = restarts
    else:
        here, earlier = _where_it_stands(store), store.read_restarts()
        in_vain = earlier.in_vain + 1 if restarts and earlier and earlier.stands == here else 0
        store.write_restarts(Restarts(here, in_vain))
    if in_vain >= MOST:
        raise RunError(
            f"This job was started {in_vain} times in a row and each time stopped before {store.out} had got any further, so "
            "it is not queued again; see log.txt there, give the job more time, and submit it anew."
        )


def _where_it_stands(store: RunStore) -> list[Any]:
    """Of every stage its status, epochs and checkpoint; and the bytes of the caches, whole ones and half-written ones."""
    state = store.load_state()
    caches = sum(path.stat().st_size for path in store.caches.glob("stage-*")) if store.caches.is_dir() else 0
    stages = [[each.status, each.epochs, _position(store.checkpoint(each.stage))] for each in state.stages]
    return [*stages, caches]


def _position(checkpoint: Path) -> list[int] | None:
    """Epoch and step of a checkpoint; where it does not say, the time that it was written at, which always differs."""
    try:
        check_readable(checkpoint)
        with safe_open(checkpoint, "np") as file:
            progress = json.loads(file.metadata()["progress"])
        return [progress["epoch"], progress["step"]]
    except FileNotFoundError:
        return None
    except (OSError, UnreadableFile, SafetensorError, TypeError, KeyError, ValueError):
        return [checkpoint.stat().st_mtime_ns]

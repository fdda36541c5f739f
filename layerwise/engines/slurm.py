"""Hands in the tasks of a run as batch jobs of Slurm, each to be started once those are done that it needs.

Nothing is left behind that waits: the jobs find all that they need in the run directory, the last one writes the encoder.
"""

from dataclasses import dataclass
from pathlib import Path

from layerwise.config import Config, function_flags
from layerwise.engines.run import UserObjects, prepared_run, tasks_left
from layerwise.engines.sbatch import QUEUE, Queue, script, submit
from layerwise.engines.task_runner import write_encoder
from layerwise.errors import ConfigError
from layerwise.events import Notify, silent
from layerwise.files import write_atomically
from layerwise.importing import python_module
from layerwise.records import write_record
from layerwise.run_store import RunStore
from layerwise.stop import StopFlag
from layerwise.training.resume import StartRequest
from layerwise.training.schedule import Task


@dataclass(frozen=True, slots=True)
class Job:
    """A task that was handed in."""

    task: Task
    number: str
    """Of the job."""
    log: Path


def submit_run(config: Config, request: StartRequest, stop: StopFlag, notify: Notify = silent) -> list[Job]:
    """Prepares the run and hands in a job for every task that is not done.

    Raises SlurmError where Slurm does not take one, RunError where jobs of an earlier start are still in its queue.
    """
    _check(config)
    folder = _folder(config)
    with prepared_run(config, UserObjects(), request, stop, notify) as (run, tasks, _):
        folder.mkdir(exist_ok=True)
        numbers: dict[Task, str] = {}
        jobs = []
        for task in tasks:
            stop.raise_if_set(f"before round {task.round}, stage {task.stage} was handed in")
            path = folder / f"{_name(task)}.sbatch"
            write_atomically(path, task_script(config, task).encode())
            numbers[task] = submit(path, [numbers[need] for need in task.needs if need in numbers])
            jobs.append(Job(task, numbers[task], _log(config, task)))
            write_record(folder / QUEUE, Queue([job.number for job in jobs]))
        if not tasks:
            write_encoder(run)
    return jobs


def scripts(config: Config, request: StartRequest) -> list[tuple[Task, str]]:
    """The batch scripts that `submit_run` would hand in; nothing is written."""
    _check(config)
    return [(task, task_script(config, task)) for task in tasks_left(config, request)]


def task_script(config: Config, task: Task) -> str:
    """The batch script of a task."""
    out = str(Path(config.out).expanduser().resolve())
    command = [*python_module("layerwise"), "task", out, "--round", str(task.round), "--stage", str(task.stage)]
    command += function_flags(config)
    options = config.engine.model_copy(update={"gpus": 0} if config.training.device == "cpu" else {})
    return script(f"{Path(out).name}-{_name(task)}", command, _log(config, task), options)


def _check(config: Config) -> None:
    if config.training.log != "none":
        raise ConfigError(
            f"--log {config.training.log}: a batch job tells no service; leave it out, metrics.jsonl has each epoch."
        )


def _folder(config: Config) -> Path:
    return RunStore.of(config.out, config.cache.dir).jobs.resolve()


def _name(task: Task) -> str:
    return f"round-{task.round}-stage-{task.stage}"


def _log(config: Config, task: Task) -> Path:
    return _folder(config) / f"{_name(task)}.txt"

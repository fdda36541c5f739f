"""Stages that train at the same time: how much of the ideal worker processes reach, and what many devices would bring.

python benchmarks/asynchronous.py [--rounds 4] [--max-epochs 12] [--workers 1 2 3] [--out runs/asynchronous]

Runs the demo in rounds with so many workers, each pinned to a core with one thread. The ideal is the same tasks, as long as
they took with one worker, handed out at once to whoever is free. The times of tasks then simulate the schedule with a device
for each stage; docs/asynchronous.svg shows it.
"""

import argparse
import heapq
import math
import shutil
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from layerwise.config import Config, resolve
from layerwise.data.open import open_data
from layerwise.engines.run import run
from layerwise.events import EpochDone, Event, StageDone, StageStarted
from layerwise.nets import shortest_sample
from layerwise.report.drawing import new_figure
from layerwise.training.cache_plan import cache_sizes
from layerwise.training.cut import cut_network
from layerwise.training.samples import TRAIN, split_samples
from layerwise.training.schedule import Task, ready, tasks_of_run
from layerwise.training.spec import StageSpec

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(slots=True)
class Times:
    """Of each task, as its events came."""

    begun: dict[Task, float] = field(default_factory=dict)
    ended: dict[Task, float] = field(default_factory=dict)
    training: dict[Task, float] = field(default_factory=dict)
    """Seconds of its epochs."""
    _round: dict[int, int] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self._round[event.stage] = event.round
            self.begun[Task(event.round, event.stage)] = time.monotonic()
        if isinstance(event, EpochDone):
            task = Task(self._round[event.stage], event.stage)
            self.training[task] = self.training.get(task, 0.0) + event.seconds
        if isinstance(event, StageDone):
            self.ended[Task(event.round, event.stage)] = time.monotonic()

    @property
    def makespan(self) -> float:
        """Seconds from the first task's beginning to the last one's end."""
        return max(self.ended.values()) - min(self.begun.values())

    @property
    def tasks(self) -> dict[Task, float]:
        """Seconds of each."""
        return {task: self.ended[task] - self.begun[task] for task in self.ended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--max-epochs", type=int, default=12)
    parser.add_argument("--simulated-epochs", type=int, default=96)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/asynchronous"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = {count: measure(options, count) for count in options.workers}
    alone = measured[options.workers[0]].tasks
    print(f"demo, {options.rounds} rounds of {options.max_epochs} epochs in all, {psutil.cpu_count()} cores\n")
    print(
        "| workers | s | ideal s | of the ideal | idle share | ideal idle share |\n| --- | --- | --- | --- | --- | --- |"
    )
    for count, times in measured.items():
        ideal = simulate(alone, count)
        work = sum(times.tasks.values())
        print(
            f"| {count} | {times.makespan:.1f} | {ideal:.1f} | {ideal / times.makespan:.2f} | "
            f"{1 - work / (count * times.makespan):.2f} | {1 - sum(alone.values()) / (count * ideal):.2f} |"
        )
    print_moved(configured(options, 1))
    draw(measured[options.workers[0]], options)


def configured(options: argparse.Namespace, workers: int) -> Config:
    """The demo in rounds."""
    changes = {
        "training.rounds": options.rounds,
        "training.max_epochs": options.max_epochs,
        "training.patience": options.max_epochs,
        "engine.devices": ",".join(["cpu"] * workers),
        "out": str(options.out / f"workers-{workers}"),
        "cache.dir": str(options.out / "cache"),
    }
    return resolve("demo", overrides=changes)


def measure(options: argparse.Namespace, workers: int) -> Times:
    """A run of its own, from its beginning."""
    config, times, over = configured(options, workers), Times(), threading.Event()
    for left in (Path(config.out), Path(config.cache.dir)):
        shutil.rmtree(left, ignore_errors=True)
    pinning = threading.Thread(target=pin_workers, args=(over,))
    pinning.start()
    run(config, notify=times)
    over.set()
    pinning.join()
    return times


def pin_workers(over: threading.Event) -> None:
    """Each worker to a core of its own, as far as there are cores."""
    cores = psutil.Process().cpu_affinity()
    while not over.wait(0.1):
        for number, child in enumerate(sorted(psutil.Process().children(), key=lambda each: each.pid)):
            child.cpu_affinity([cores[number % len(cores)]])


def simulate(seconds: Mapping[Task, float], workers: int) -> float:
    """Seconds until all tasks are done, each begun as soon as its needs are met and a worker is free."""
    waiting, undone = sorted(seconds), set(seconds)
    running: list[tuple[float, Task]] = []
    now = 0.0
    while undone:
        while len(running) < workers and (task := ready(waiting, undone)):
            waiting.remove(task)
            heapq.heappush(running, (now + seconds[task], task))
        now, task = heapq.heappop(running)
        undone.discard(task)
    return now


def print_moved(config: Config) -> None:
    """Bytes that pass from stage to stage in an epoch, against an end-to-end pipeline of the same stages."""
    data = open_data(config.data, shortest_sample(config))
    plans = cut_network(config, data, torch.device("cpu"))
    published = sum(room.activations for room in cache_sizes(plans, data, config.cache)[:-1])
    ours = published * config.training.rounds / config.training.max_epochs
    samples = int((split_samples(data, config) == TRAIN).sum())
    pipeline = sum(2 * 4 * samples * values_out(plan) for plan in plans[:-1])
    print(
        f"\nPublished from stage to stage: {ours / 1e6:.0f} MB an epoch ({published / 1e6:.0f} MB a round, "
        f"{config.cache.dtype}, whole samples, every view).\nAn end-to-end pipeline would move {pipeline / 1e6:.0f} MB an "
        "epoch: the activations of every window up and their gradients down, float32.\n"
        f"Ours is {ours / pipeline:.2f} of it, and no step waits for it."
    )


def values_out(plan: StageSpec) -> int:
    """Numbers that a stage puts out for a window."""
    rows = plan.build_module(0, torch.device("meta")).out_length(plan.window.rows)
    return int(rows) * math.prod(plan.output_shape)


def draw(times: Times, options: argparse.Namespace) -> None:
    """Speed with a device for each stage over that with one device, against the number of rounds."""
    stages = max(task.stage for task in times.tasks)
    seconds, rounds = times.tasks, options.rounds
    longer = options.simulated_epochs / options.max_epochs
    training = [longer * sum(times.training[Task(r, s)] for r in range(1, rounds + 1)) for s in range(1, stages + 1)]
    caching = [
        statistics.median(seconds[Task(r, s)] - times.training[Task(r, s)] for r in range(1, rounds + 1))
        for s in range(1, stages + 1)
    ]
    figure = new_figure(3.4)
    axes = figure.subplots()
    print(f"\nSimulated, {options.simulated_epochs} epochs of each stage:\n")
    print("| stages on as many devices | rounds | times as fast as one device in one round | idle share |")
    print("| --- | --- | --- | --- |")
    for count in (6, 48):
        one = sum(training[s % stages] + caching[s % stages] for s in range(count))
        speeds = []
        for number in ROUNDS:
            of_tasks = {
                task: training[(task.stage - 1) % stages] / number + caching[(task.stage - 1) % stages]
                for task in tasks_of_run(count, number)
            }
            makespan = simulate(of_tasks, count)
            speeds.append(one / makespan)
            idle = 1 - sum(of_tasks.values()) / (count * makespan)
            print(f"| {count} | {number} | {one / makespan:.2f} | {idle:.2f} |")
        axes.plot(ROUNDS, speeds, marker="o", label=f"{count} stages on {count} devices")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ROUNDS, ROUNDS)
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    axes.set_xlabel("rounds")
    axes.set_ylabel("times as fast as one device")
    axes.legend()
    figure.savefig(DOCS / "asynchronous.svg", metadata={"Date": None})


ROUNDS = [1, 2, 4, 8, 16, 32, 64]


if __name__ == "__main__":
    main()

"""A stage that trains from its cache against the same stage that trains from batches that lie in memory: steps per second.

python benchmarks/feeding.py [--folder .] [--gigabytes 1] [--steps 10] [--rounds 9] [--networks speech vision]

Stage 2 of the paper's networks. The cache is dropped from memory first, so the windows come from the disk and their
checksums are compared; the ways take turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from steps import host_batch, machine, natural_stages, paper

from cache import drop_pages
from layerwise.cache import ActivationCache, CacheWriter, Layout
from layerwise.data.batches import Batch, training_epoch
from layerwise.memory.meter import meter_for
from layerwise.memory.plan import MemoryPlan
from layerwise.training.context import RunContext
from layerwise.training.loader import SourceLoader
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import StageTrainer, StepRandomness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--networks", nargs="+", choices=("speech", "vision"), default=("speech", "vision"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"batch {options.batch_size}, {machine(device)}\n")
    print("| stage | steps/s from memory | from its cache | ratio |\n| --- | --- | --- | --- |")
    for kind in options.networks:
        config, data = paper(kind, options.batch_size)
        plan = natural_stages(config, data)[1]
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder) / "cache.h5"
            write(path, plan, data.columns, options.gigabytes)
            drop_pages(path)
            with meter_for(device, None) as meter, ActivationCache(path) as cache:
                loaded = StageTrainer(
                    plan, config, MemoryPlan(options.batch_size, options.batch_size), RunContext(device, meter)
                )
                kept = [host_batch(config, plan) for _ in range(3)]
                ways = {
                    "memory": (kept[number % 3] for number in range(10**9)),
                    "cache": endless(SourceLoader(cache), plan, options.batch_size),
                }
                seconds = {name: [] for name in ways}
                for turn in range(options.rounds + 1):
                    for name, batches in ways.items():
                        took = timed(loaded, islice(batches, options.steps))
                        if turn:  # the first one warms up
                            seconds[name].append(took)
        ratio = statistics.median(m / c for m, c in zip(seconds["memory"], seconds["cache"], strict=True))
        speeds = [options.steps / statistics.median(seconds[name]) for name in ("memory", "cache")]
        print(f"| {kind} 2 | {speeds[0]:.2f} | {speeds[1]:.2f} | {ratio:.3f} |", flush=True)


def write(path: Path, plan: StageSpec, columns: int, gigabytes: float) -> None:
    """A cache of noise, of samples twice as long as the window (pictures: as large)."""
    frames = plan.window.frames * (2 if columns == 1 else 1)
    row_bytes = 2 * int(np.prod(plan.frame_shape))
    samples = max(round(gigabytes * 1e9 / row_bytes / frames), 8)
    layout = Layout(
        fingerprint="0" * 64,
        stage=1,
        dtype="float16",
        frame_shape=plan.frame_shape,
        columns=columns,
        views=1,
        lengths=np.full(samples, frames, dtype=np.int64),
        ids=tuple(str(number) for number in range(samples)),
        split=np.zeros(samples, dtype=np.uint8),
        labels={},
        labels_classes={},
        frame_labels_classes={},
        hop=1,
        offset=0.0,
    )
    rows = np.random.default_rng(0).standard_normal((frames, *plan.frame_shape)).astype("<f2")
    with CacheWriter(path, layout) as writer:
        for _ in range(samples):
            writer.write(rows)
        writer.seal()


def endless(feed: SourceLoader, plan: StageSpec, batch_size: int) -> Iterator[Batch]:
    """Epoch after epoch, each read ahead as in training."""
    rng = np.random.default_rng(0)
    while True:
        epoch = training_epoch(feed, np.arange(len(feed.lengths)), plan.window, batch_size, rng)
        yield from feed.batches(epoch, 0, lambda: None)


def timed(loaded: StageTrainer, batches: Iterator[Batch]) -> float:
    began = time.perf_counter()
    for batch in batches:
        loaded.train(batch, StepRandomness(lambda: np.random.default_rng(0)))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

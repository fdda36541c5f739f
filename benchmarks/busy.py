"""What a training step asks of a GPU: kernels, copies and waits, and how long the host takes to ask for it.

python benchmarks/busy.py [--batches 8 64] [--steps 32] [--width 8]

The stages of the paper's speech network, as they are laid out for a GPU without a budget. Kernels, copies and waits are
counted on the simulated GPU of tests/simulated_gpu, the reading of losses included; they do not depend on the width. Times are
those of the processor: of the thread that steps, over so few frames that the kernels themselves take little of it; and of the
thread that reads, for what it draws and packs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from steps import host_batch, machine, natural_stages, paper

from layerwise.config import Config
from layerwise.memory.meter import meter_for
from layerwise.memory.plan import MemoryPlan
from layerwise.training.budget import fit_stage
from layerwise.training.context import RunContext
from layerwise.training.scores import READ_AT_ONCE, UnreadScores
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import StageTrainer, StepRandomness

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "simulated_gpu"))
from simulated_gpu import CPU, GPU, Counts, SimulatedGPU
from torch_cuda import installed

SHORT = {"data.window": 2560, "objective.anchors": 16, "objective.gap": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=(8, 64))
    parser.add_argument("--steps", type=int, default=2 * READ_AT_ONCE)
    parser.add_argument("--width", type=int, default=8)
    options = parser.parse_args()
    print(f"{options.steps} steps, width {options.width}, {machine(CPU)}\n")
    print("| batch | stage | kernels | copies | waits | host ms | draw ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    widths = {"net.width": options.width, "net.context": options.width}
    for batch_size in options.batches:
        config, data = paper("speech", batch_size, **widths)
        small, short = paper("speech", 8, **widths, **SHORT)
        for spec, of_host in zip(natural_stages(config, data), natural_stages(small, short), strict=True):
            with installed(SimulatedGPU(total=64 * 2**30)) as gpu:
                plan = fit_stage(config, spec, GPU)
                counts = counted(spec, config, plan, gpu, options.steps)
            step, _ = milliseconds(of_host, small, replace(plan, batch_size=8, micro_batch=8), options.steps)
            _, ahead = milliseconds(spec, config, plan, options.steps)
            each = [getattr(counts, name) / options.steps for name in ("kernels", "to_device", "to_host", "waits")]
            print(
                f"| {batch_size} | {spec.stage} | {each[0]:.1f} | {each[1] + each[2]:.2f} | {each[3]:.3f} | "
                f"{step:.2f} | {ahead:.2f} |",
                flush=True,
            )


def counted(spec: StageSpec, config: Config, plan: MemoryPlan, gpu: SimulatedGPU, steps: int) -> Counts:
    """What so many steps ask for, behind the first two."""
    trainer = StageTrainer(spec, config, plan, RunContext(GPU, meter_for(GPU, None)))
    unread: UnreadScores[int] = UnreadScores(GPU)
    current = trainer.prepared(host_batch(config, spec), drawn(-2))
    for number in range(-2, steps):
        if not number:
            unread.read()
            gpu.counts = Counts()
        following = trainer.prepared(host_batch(config, spec), drawn(number + 1))
        trainer.send_for(following)
        unread.add(number, trainer.train(current, drawn(number)))
        current = following
        if unread.due:
            unread.read()
    trainer.forget_coming()
    return replace(gpu.counts)


def milliseconds(spec: StageSpec, config: Config, plan: MemoryPlan, steps: int) -> tuple[float, float]:
    """Of a step, and of what is drawn ahead of it by the thread that reads; medians."""
    trainer = StageTrainer(spec, config, plan, RunContext(CPU, meter_for(CPU, None)))
    batch = host_batch(config, spec)

    def took() -> Iterator[tuple[float, float]]:
        for number in range(steps):
            began = time.thread_time()
            prepared = trainer.prepared(batch, drawn(number))
            between = time.thread_time()
            trainer.train(prepared, drawn(number))
            yield time.thread_time() - between, between - began

    of_steps, ahead = zip(*list(took())[2:], strict=True)
    return 1e3 * statistics.median(of_steps), 1e3 * statistics.median(ahead)


def drawn(number: int) -> StepRandomness:
    return StepRandomness(lambda: np.random.default_rng(abs(number)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

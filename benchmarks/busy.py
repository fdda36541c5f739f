"""What a training step asks of a GPU: kernels, copies and waits, and how long the host takes to ask for it.

python benchmarks/busy.py [--batches 8 64] [--steps 32] [--width 8]

The stages of the paper's speech network, as they are laid out for a GPU without a budget. Kernels, copies and waits are
counted on the simulated GPU of tests/simulated_gpu, the reading of losses included, and do not depend on the width; the time is
that of the same steps on the CPU, where kernels of so few channels take little of it.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=(8, 64))
    parser.add_argument("--steps", type=int, default=2 * READ_AT_ONCE)
    parser.add_argument("--width", type=int, default=8)
    options = parser.parse_args()
    print(f"{options.steps} steps, width {options.width}, {machine(CPU)}\n")
    print("| batch | stage | kernels | copies | waits | host ms | draw ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for batch_size in options.batches:
        config, data = paper("speech", batch_size, **{"net.width": options.width, "net.context": options.width})
        for spec in natural_stages(config, data):
            with installed(SimulatedGPU(total=64 * 2**30)) as gpu:
                plan = fit_stage(config, spec, GPU)
                counts = counted(spec, config, plan, gpu, options.steps)
            host, ahead = milliseconds(spec, config, plan, options.steps)
            each = [getattr(counts, name) / options.steps for name in ("kernels", "to_device", "to_host", "waits")]
            print(
                f"| {batch_size} | {spec.stage} | {each[0]:.1f} | {each[1] + each[2]:.2f} | {each[3]:.3f} | "
                f"{host:.2f} | {ahead:.2f} |",
                flush=True,
            )


def counted(spec: StageSpec, config: Config, plan: MemoryPlan, gpu: SimulatedGPU, steps: int) -> Counts:
    """What so many steps ask for, behind the first two."""
    trainer = StageTrainer(spec, config, plan, RunContext(GPU, meter_for(GPU, None)))
    unread: UnreadScores[int] = UnreadScores(GPU)
    for number in range(-2, steps):
        if not number:
            unread.read()
            gpu.counts = Counts()
        unread.add(number, trainer.train(trainer.prepared(host_batch(config, spec), drawn(number)), drawn(number)))
        if unread.due:
            unread.read()
    return replace(gpu.counts)


def milliseconds(spec: StageSpec, config: Config, plan: MemoryPlan, steps: int) -> tuple[float, float]:
    """Of a step, and of what is drawn ahead of it by the thread that reads; medians."""
    trainer = StageTrainer(spec, config, plan, RunContext(CPU, meter_for(CPU, None)))
    batch = host_batch(config, spec)

    def took() -> Iterator[tuple[float, float]]:
        for number in range(steps):
            began = time.perf_counter()
            prepared = trainer.prepared(batch, drawn(number))
            between = time.perf_counter()
            score = trainer.train(prepared, drawn(number))
            yield time.perf_counter() - between, between - began
            del score

    of_steps, ahead = zip(*list(took())[2:], strict=True)
    return 1e3 * statistics.median(of_steps), 1e3 * statistics.median(ahead)


def drawn(number: int) -> StepRandomness:
    return StepRandomness(lambda: np.random.default_rng(abs(number)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

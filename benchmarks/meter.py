"""What metering costs: steps of each stage unmetered, with every operation looked at, and as a run does it, now and then.

python benchmarks/meter.py [--rounds 15]
"""

import argparse

import numpy as np
import torch
from steps import Step, machine, natural_stages, our_stage, paper, seconds_in_turn

from layerwise.config import Config
from layerwise.memory.meter import Meter
from layerwise.memory.plan import MemoryPlan
from layerwise.training.spec import StageSpec

STEPS = 256
"""Steps of a run over which the looks are counted."""


class Always(Meter):
    """Looks at every step."""

    def should_meter(self, name: str, *sizes: int) -> bool:
        return True


class Never(Meter):
    """Looks at none."""

    def should_meter(self, name: str, *sizes: int) -> bool:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = torch.device("cpu")
    config, data = paper("speech", 8)
    print(f"speech, batch 8, {machine(device)}\n")
    print("| stage | unmetered s | every step looked at | steps looked at in a run | cost in a run |")
    print("| --- | --- | --- | --- | --- |")
    for plan in natural_stages(config, data):
        steps = [_step(config, plan, meter) for meter in (Never(device), Always(device))]
        free, looked = seconds_in_turn(steps, device, options.rounds)
        share = looks_in_a_run(config, plan)
        cost = looked / free - 1
        print(f"| {plan.stage} | {free:.3f} | {cost:+.1%} | {share:.1%} | {cost * share:+.2%} |", flush=True)


def looks_in_a_run(config: Config, plan: StageSpec) -> float:
    """Share of steps that are metered: first ones, those with more rows than any before, and every so many."""
    device = torch.device("cpu")
    meter, objective = Meter(device), plan.build_objective(config, torch.device("meta"))
    frames = int(plan.build_module(0, torch.device("meta")).out_length(plan.window.frames))
    lengths = np.full(config.training.batch_size, frames)
    draws = (objective.draw(lengths, frames, plan.window.columns, np.random.default_rng(i))[0] for i in range(STEPS))
    return sum(meter.should_meter("training", frames, len(draw.rows)) for draw in draws) / STEPS


def _step(config: Config, plan: StageSpec, meter: Meter) -> Step:
    size = config.training.batch_size
    with meter:
        step = our_stage(config, plan, torch.device("cpu"), MemoryPlan(size, size), meter)

    def inside() -> None:
        with meter:
            step()

    return inside


if __name__ == "__main__":
    main()

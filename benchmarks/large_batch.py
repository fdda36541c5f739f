"""A batch of 64 under a fraction of what end to end takes: the planner lays it out, the meter measures.

python benchmarks/large_batch.py [--batch-size 64] [--fraction 0.12] [--device cpu]
"""

import argparse
from functools import partial

import torch
from steps import end_to_end, machine, metered_step, natural_stages, our_stage, paper, peak_of, seconds_in_turn

from layerwise.training.budget import fit_stage
from layerwise.training.training_peak import training_peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--fraction", type=float, default=0.12)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)

    config, data = paper("speech", options.batch_size)
    base = peak_of(lambda _: end_to_end(config, data, device, recompute=False), device)
    budget = int(options.fraction * base)
    changes = {"memory.gpu_mem": f"{budget}B", "memory.optimizer": "device"}
    config, data = paper("speech", options.batch_size, **changes)
    print(f"speech, batch {options.batch_size}, {machine(device)}")
    print(f"end to end {base / 1e6:.1f} MB, budget {budget / 1e6:.1f} MB\n")
    print("| stage | layout | predicted MB | measured MB | of end to end | s |\n| --- | --- | --- | --- | --- | --- |")
    for plan in natural_stages(config, data):
        memory_plan = fit_stage(config, plan, device)
        predicted = training_peak(config, plan, memory_plan).bytes
        make = partial(our_stage, config, plan, device, memory_plan)
        peak = peak_of(make, device)
        (seconds,) = seconds_in_turn([metered_step(make, device)], device, rounds=1)
        figures = f"{predicted / 1e6:.1f} | {peak / 1e6:.1f} | {peak / base:.3f} | {seconds:.2f}"
        print(f"| {plan.stage} | {memory_plan} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

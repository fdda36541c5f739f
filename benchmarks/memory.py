"""Peak memory and time of a step: end to end, stages with the plain loss, ours in whole batches and in micro-batches.

python benchmarks/memory.py speech|vision [--batch-size 8] [--device cpu] [--rounds 5] [--peaks-only]
"""

import argparse
from functools import partial

import torch
from steps import (
    end_to_end,
    floor_of,
    machine,
    metered_step,
    natural_stages,
    our_stage,
    paper,
    peak_of,
    plain_stage,
    seconds_in_turn,
)

from layerwise.memory.plan import NARROW_ROOM, MemoryPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["speech", "vision"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    config, data = paper(options.network, options.batch_size)
    stages = natural_stages(config, data)
    whole = MemoryPlan(options.batch_size, options.batch_size)
    sliced = MemoryPlan(options.batch_size, options.micro_batch, loss_room=NARROW_ROOM)

    print(f"{options.network}, batch {options.batch_size}, {machine(device)}\n")
    print("| step | stage | peak MB | of end to end | s |\n| --- | --- | --- | --- | --- |")
    both = [partial(end_to_end, config, data, device, recompute) for recompute in (False, True)]
    peaks = [peak_of(lambda _, make=make: make(), device) for make in both]
    seconds = seconds_in_turn([make() for make in both], device, options.rounds)
    base = peaks[0]
    for name, peak, took in zip(("end to end", "end to end, checkpointed"), peaks, seconds, strict=True):
        print(f"| {name} | all | {peak / 1e6:.1f} | {peak / base:.3f} | {took:.3f} |", flush=True)

    names = ("plain loss", "ours, whole batch", f"ours, micro-batch {options.micro_batch}", "floor")
    rows: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for plan in stages:
        ways = [
            lambda _, plan=plan: plain_stage(config, plan, device),
            lambda meter, plan=plan: our_stage(config, plan, device, whole, meter),
            lambda meter, plan=plan: our_stage(config, plan, device, sliced, meter),
        ]
        peaks = [peak_of(way, device) for way in ways]
        steps = [plain_stage(config, plan, device), *(metered_step(way, device) for way in ways[1:])]
        *seconds, module, predictors = seconds_in_turn(
            [*steps, *floor_of(config, plan, device)], device, options.rounds
        )
        for name, peak, took in zip(names, [*peaks, 0], [*seconds, module + predictors], strict=True):
            rows[name].append((peak, took))
        del steps
    floor = sum(took for _, took in rows["floor"])
    for name in names:
        for number, (peak, took) in enumerate(rows[name], start=1):
            memory = f"{peak / 1e6:.1f} | {peak / base:.3f}" if peak else " | "
            print(f"| {name} | {number} | {memory} | {took:.3f} |")
    print()
    for name in names:
        largest, total = max(peak for peak, _ in rows[name]), sum(took for _, took in rows[name])
        print(
            f"{name}: largest {largest / base:.3f} of end to end, all stages {total:.3f} s, {total / floor:.2f} of the floor"
        )


if __name__ == "__main__":
    main()

"""Bytes that CUDA's allocator reserves for training steps: predicted from a rehearsal, against the model of the allocator under
the very steps, on the simulated GPU; and whether the steps go through with no more than what was predicted.

python benchmarks/reserved.py [--first 1] [--last 23]
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from steps import machine, natural_stages, our_stage, paper

from layerwise.config import Config
from layerwise.memory.driver import possible_segments, segments_used, take_workspaces
from layerwise.memory.meter import meter_for
from layerwise.memory.plan import NARROW_ROOM, ROOMS, ROOMS_OF_GPU, WIDE_ROOM, MemoryPlan
from layerwise.memory.reserved import Allocations, Segments
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import StepRandomness
from layerwise.training.training_peak import training_peak

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "simulated_gpu"))

from simulated_gpu import GPU, SimulatedGPU
from torch_cuda import installed

STEPS = 3
"""Of each case, with other negatives each."""


@dataclass(frozen=True)
class Case:
    """A layout of a stage of one of the paper's networks."""

    network: str
    stage: int
    config: Config
    spec: StageSpec
    plan: MemoryPlan


@dataclass(frozen=True)
class Outcome:
    """In bytes."""

    segments: Segments
    requested: int
    """Most that tensors have, workspaces included."""
    modelled: int
    """Fewest that must be reserved for the steps."""
    predicted: int
    retries: int
    """How often the allocator gave everything free back to the driver, where no more than predicted could be reserved."""
    holds: bool
    """Whether the steps went through then."""


def cases() -> Iterator[Case]:
    whole = MemoryPlan(8, 8)
    narrow = replace(whole, micro_batch=2, loss_room=NARROW_ROOM)
    layouts = {
        1: [whole, narrow, replace(narrow, parts=2), replace(narrow, optimizer_on_host=True, gradients_wait=True)],
        2: [whole, narrow, replace(narrow, micro_batch=1, parts=1)],
        3: [whole],
        5: [whole, replace(narrow, optimizer_on_host=True)],
        6: [whole, narrow, replace(narrow, micro_batch=1, loss_room=ROOMS[-1])],
    }
    yield from _of_stages("speech", layouts, 8)
    yield from _of_stages("speech", {1: [MemoryPlan(16, 16), MemoryPlan(16, 4, loss_room=NARROW_ROOM)]}, 16)
    whole = MemoryPlan(4, 4)
    narrow = replace(whole, micro_batch=2, loss_room=NARROW_ROOM)
    layouts = {1: [whole, narrow, replace(whole, recompute=True)], 2: [whole], 3: [narrow]}
    yield from _of_stages("vision", layouts, 4)
    at_once = MemoryPlan(8, 8, loss_room=ROOMS_OF_GPU[0])
    yield from _of_stages("speech", {1: [at_once], 2: [at_once], 6: [at_once]}, 8)
    ahead, resident = replace(at_once, ahead=True), replace(at_once, resident=50_000)
    yield from _of_stages(
        "speech", {1: [ahead], 2: [ahead, resident], 6: [ahead, replace(resident, loss_room=WIDE_ROOM)]}, 8
    )


def _of_stages(network: str, layouts: dict[int, list[MemoryPlan]], batch_size: int) -> Iterator[Case]:
    config, data = paper(network, batch_size)
    for spec in natural_stages(config, data):
        for plan in layouts.get(spec.stage, []):
            yield Case(network, spec.stage, config, spec, plan)


def measured(case: Case) -> Outcome:
    """On a device of its own."""
    with installed(SimulatedGPU(total=64 * 2**30)) as gpu:
        ways = [segments for segments in possible_segments(GPU) if segments is not None]
        predicted = {segments: training_peak(case.config, case.spec, case.plan, segments).bytes for segments in ways}
        segments = min(ways, key=lambda each: predicted[each])
        log = gpu.allocator.log = Allocations()
        requested = _take_steps(case, segments, log)
        gpu.allocator.log = None
    modelled = log.fewest(Segments(segments.expandable))
    with installed(SimulatedGPU(total=64 * 2**30)) as gpu:
        gpu.allocator.allowed = segments.allowed(predicted[segments])
        try:
            _take_steps(case, segments, None)
            holds = gpu.allocator.figures.num_ooms == 0 and gpu.allocator.most_reserved <= predicted[segments]
        except RuntimeError:
            holds = False
        retries = gpu.allocator.retries
    return Outcome(segments, requested, modelled, predicted[segments], retries, holds)


def _take_steps(case: Case, segments: Segments, log: Allocations | None) -> int:
    """Bytes that tensors requested at the highest point."""
    torch.manual_seed(0)
    meter = meter_for(GPU, None)
    with segments_used(GPU, segments), meter:
        take_workspaces(GPU)
        step = our_stage(case.config, case.spec, GPU, case.plan, meter)
        if log is not None:
            log.begin_step()
        for _ in range(STEPS):
            step()
        step.loaded.evaluate(step.batch, StepRandomness(partial(np.random.default_rng, 0)))
        step.loaded.forget_coming()
        return meter.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=1, help="the case to begin with")
    parser.add_argument("--last", type=int, help="the case to end with")
    options = parser.parse_args()
    print(f"{machine(torch.device('cpu'))}, on the simulated GPU\n")
    print(
        "| network | stage | layout | segments | requested MB | modelled MB | predicted MB | ratio | retries | holds |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    ratios = []
    for case in islice(cases(), options.first - 1, options.last):
        found = measured(case)
        ratios.append(found.predicted / found.modelled)
        sizes = " | ".join(f"{size / 1e6:.1f}" for size in (found.requested, found.modelled, found.predicted))
        layout = f"batch {case.plan.batch_size}, {case.plan}{', loss at once' * (case.plan.loss_room in ROOMS_OF_GPU)}"
        layout += ", next batch ahead" * case.plan.ahead
        kind = "expandable" if found.segments.expandable else "fixed"
        print(
            f"| {case.network} | {case.stage} | {layout} | {kind} | {sizes} | {ratios[-1]:.3f} | {found.retries} | "
            f"{'yes' if found.holds else 'no'} |",
            flush=True,
        )
    print(f"\n{len(ratios)} cases: predicted / modelled from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()

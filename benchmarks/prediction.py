"""Predicted against measured peaks of training steps, and which of two layouts is faster: both of the paper's networks, a
ResNet-50 and a ViT, from the largest budget that matters to the smallest.

python benchmarks/prediction.py [--device cpu] [--rounds 3]
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import torch
from steps import machine, metered_step, our_stage, paper, peak_of, seconds_in_turn
from torchvision.models import VisionTransformer, resnet50

from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.memory.driver import beside_tensors, workspace_bytes
from layerwise.memory.plan import MemoryPlan
from layerwise.memory.rates import measured_rates
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network
from layerwise.training.budget import fit_stage, smallest_budget
from layerwise.training.cut import cut_network
from layerwise.training.spec import StageSpec
from layerwise.training.training_peak import training_peak
from layerwise.training.work import step_cost

BUDGETS = (1.0, 0.7, 0.45, 0.3, 0.0)
"""Parts of what the cheapest plan takes; 0: the smallest budget."""

TOLD_APART = 1.2
"""Times by which the slower of two layouts takes longer where the faster one is to be predicted."""

PATCHES = {
    "data.patch": 32,
    "data.patch_stride": 16,
    "data.crop": 64,
    "data.gray": False,
    "objective.steps": 1,
    "objective.skip": 0,
}
"""A 3x3 grid of patches of 32 x 32 pixels, each of which goes through the network by itself."""


def networks() -> Iterator[tuple[str, Config, DataSet, Network | None]]:
    yield "speech", *paper("speech", 8), None
    yield "vision", *paper("vision", 4), None
    torch.manual_seed(0)
    config, data = paper("vision", 4, **PATCHES, **{"training.stages": 4})
    yield "resnet50", config, data, traced_network(resnet50(), data.frame_shape)
    vit = VisionTransformer(32, 4, num_layers=6, num_heads=4, hidden_dim=192, mlp_dim=768)
    config, data = paper("vision", 4, **PATCHES, **{"training.stages": 3})
    yield "vit", config, data, traced_network(vit, data.frame_shape)


@dataclass(frozen=True)
class Case:
    """A layout of a stage."""

    network: str
    stage: int
    plan: MemoryPlan
    cost: float
    """Predicted time, in operations."""
    ratio: float
    """Predicted peak over the measured one."""
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{machine(device)}, {measured_rates(device).flops_per_byte} operations while a byte is moved\n")
    print("| network | stage | budget MB | layout | predicted MB | measured MB | ratio | predicted in s | step s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    cases = []
    for name, config, data, network in networks():
        for spec in cut_network(config, data, device, network):
            cases += _cases(name, config, spec, device, options.rounds)
    for kind, some in (
        ("resident", [c for c in cases if not c.plan.parts]),
        ("streamed", [c for c in cases if c.plan.parts]),
    ):
        ratios = [case.ratio for case in some]
        print(f"\n{len(some)} {kind} cases: predicted / measured from {min(ratios):.4f} to {max(ratios):.4f}")
    pairs = [
        (one, other)
        for one, other in permutations(cases, 2)
        if (one.network, one.stage) == (other.network, other.stage) and other.seconds >= TOLD_APART * one.seconds
    ]
    right = sum(one.cost < other.cost for one, other in pairs)
    print(
        f"of {len(pairs)} pairs of layouts of a stage whose times differ by 20 % or more, the faster is predicted in {right}"
    )
    for one, other in pairs:
        if one.cost >= other.cost:
            print(
                f"  not: {one.network} {one.stage}: {one.plan} in {one.seconds:.3f} s, {other.plan} in {other.seconds:.3f} s"
            )


def _cases(name: str, config: Config, spec: StageSpec, device: torch.device, rounds: int) -> list[Case]:
    full = training_peak(config, spec, fit_stage(config, spec, device)).bytes
    smallest, flops_per_byte = smallest_budget(config, spec, device), measured_rates(device).flops_per_byte
    found: dict[MemoryPlan, str] = {}
    budgets: dict[MemoryPlan, int] = {}
    for part in BUDGETS:
        budget = max(int(part * full) + beside_tensors(device) + workspace_bytes(device), smallest)
        memory = config.memory.model_copy(update={"gpu_mem": budget, "flops_per_byte": flops_per_byte})
        started = time.perf_counter()
        memory_plan = fit_stage(config.model_copy(update={"memory": memory}), spec, device)
        took = time.perf_counter() - started
        if memory_plan is not None and memory_plan not in found:
            found[memory_plan], budgets[memory_plan] = f"{took:.1f}", budget
    makes = {plan: partial(our_stage, config, spec, device, plan) for plan in found}
    measured = {plan: peak_of(make, device, steps=3) for plan, make in makes.items()}
    seconds = seconds_in_turn([metered_step(make, device) for make in makes.values()], device, rounds)
    cases = []
    for plan, step in zip(found, seconds, strict=True):
        predicted = training_peak(config, spec, plan).bytes
        cost = step_cost(config, spec, plan, flops_per_byte)[0]
        cases.append(Case(name, spec.stage, plan, cost, predicted / measured[plan], step))
        sizes = f"{budgets[plan] / 1e6:.1f} | {plan} | {predicted / 1e6:.2f} | {measured[plan] / 1e6:.2f}"
        print(f"| {name} | {spec.stage} | {sizes} | {cases[-1].ratio:.4f} | {found[plan]} | {step:.3f} |", flush=True)
    return cases


if __name__ == "__main__":
    main()

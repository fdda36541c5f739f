"""Predicted against measured peaks of training steps: both of the paper's networks, a ResNet-50 and a ViT, several budgets.

python benchmarks/prediction.py [--device cpu]
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial

import torch
from steps import machine, our_stage, paper, peak_of
from torchvision.models import VisionTransformer, resnet50

from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.memory.device import context_bytes, workspace_bytes
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network
from layerwise.training.budget import fit_stage
from layerwise.training.cut import cut_network
from layerwise.training.peaks import training_peak
from layerwise.training.spec import StageSpec

BUDGETS = (1.0, 0.7, 0.45)
"""Parts of what the cheapest plan takes."""

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    print(f"{machine(device)}\n")
    print("| network | stage | budget MB | layout | predicted MB | measured MB | ratio | predicted in s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    ratios = []
    for name, config, data, network in networks():
        started = time.perf_counter()
        plans = cut_network(config, data, device, network)
        if network is not None:
            print(f"(cut into {[len(plan.layers) for plan in plans]} units in {time.perf_counter() - started:.1f} s)")
        for plan in plans:
            ratios += list(_cases(name, config, plan, device))
    print(f"\n{len(ratios)} cases: predicted / measured from {min(ratios):.4f} to {max(ratios):.4f}")


def _cases(name: str, config: Config, plan: StageSpec, device: torch.device) -> Iterator[float]:
    cheapest = fit_stage(config, plan, device)
    full = training_peak(config, plan, cheapest).bytes
    seen = set()
    for part in BUDGETS:
        budget = int(part * full) + context_bytes(device) + workspace_bytes(device)
        memory = config.memory.model_copy(update={"gpu_mem": budget})
        limited = config.model_copy(update={"memory": memory})
        started = time.perf_counter()
        memory_plan = fit_stage(limited, plan, device)
        took = time.perf_counter() - started
        if memory_plan is None or memory_plan in seen:
            continue
        seen.add(memory_plan)
        predicted = training_peak(limited, plan, memory_plan).bytes
        measured = peak_of(partial(our_stage, limited, plan, device, memory_plan), device, steps=3)
        yield predicted / measured
        sizes = f"{budget / 1e6:.1f} | {memory_plan} | {predicted / 1e6:.2f} | {measured / 1e6:.2f}"
        print(f"| {name} | {plan.stage} | {sizes} | {predicted / measured:.4f} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()

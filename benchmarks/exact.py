"""Whether layouts are exact: the weights of the smallest budget against those of the whole batch, in float64 too.

    python benchmarks/exact.py [--seeds 5] [--float64] [--smooth]

Beside it, as a measure of what rounding does: the whole batch once more, on two threads in place of one. --smooth: with
softplus(20 x) / 20 in place of every ReLU, which rounding cannot open or close.

Nothing in the package computes in float64. Here the names of float32 are made to mean it, before the package is imported:
weights, the caches, losses, gradients and Adam's moments are float64 then; the recordings are what they are.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

if "--float64" in sys.argv:
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float64
    torch.Tensor.float = torch.Tensor.double
if "--smooth" in sys.argv:
    functional.relu = functional.relu_ = partial(functional.softplus, beta=20.0)

from budgets import distances, run_under

from layerwise.cache.dtypes import STORED, Stored
from layerwise.config import resolve
from layerwise.engines.plan import plan

if "--float64" in sys.argv:
    STORED["float32"] = Stored(torch.float64, "<f8", "<f8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--smooth", action="store_true")
    options = parser.parse_args()
    print("| seed | budget MB | weights of stages 1 to 6 off by | by a second thread |\n| --- | --- | --- | --- |")
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        base = {
            "data.source": "demo",
            "training.stages": 6,
            "training.max_epochs": 1,
            "training.batch_size": 8,
            "training.device": "cpu",
            "training.lr": 2e-4,
            "training.seed": seed,
            "cache.dtype": "float32",
            "memory.flops_per_byte": 16,
        }
        smallest = plan(resolve(overrides=base)).smallest_budget_bytes
        with tempfile.TemporaryDirectory() as place:
            torch.set_num_threads(1)
            whole, least = (run_under(base, budget, Path(place) / "one") for budget in (None, smallest))
            torch.set_num_threads(2)
            threads = run_under(base, None, Path(place) / "two")
            off, by_threads = (
                ", ".join(f"{distance:.0e}" for distance in distances(other, whole)) for other in (least, threads)
            )
            print(f"| {seed} | {smallest / 1e6:.2f} | {off} | {by_threads} |", flush=True)


if __name__ == "__main__":
    main()

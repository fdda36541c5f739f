"""The same run under budgets from the smallest possible upwards: what changes is the time, not the weights.

    python benchmarks/budgets.py [--data demo] [--epochs 1] [--batch-size 8] [--lr 2e-4] [--dtype float32] [--plot FILE]

The plot needs matplotlib: pip install matplotlib.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from steps import machine

from layerwise.config import resolve
from layerwise.engines.plan import plan
from layerwise.engines.run import RunResult, run
from layerwise.training.checkpoint import Arrays, load_stages

FACTORS = (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0)
"""Budgets, as multiples of the smallest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--dtype", default="float32", help="of the caches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    base = {
        "data.source": options.data,
        "training.stages": 6,
        "training.max_epochs": options.epochs,
        "training.batch_size": options.batch_size,
        "training.device": options.device,
        "training.lr": options.lr,
        "cache.dtype": options.dtype,
    }
    smallest = plan(resolve(overrides=base)).smallest_budget_bytes
    print(f"{options.data}, {machine(torch.device(options.device))}, smallest budget {smallest / 1e6:.2f} MB\n")
    print("| budget MB | peak MB | seconds | weights of stages 1 to 6 off by | largest loss difference |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        free = run_under(base, None, Path(place))
        rows = []
        for factor in FACTORS:
            budget = int(factor * smallest)
            limited = run_under(base, budget, Path(place))
            rows.append((budget, limited))
            report(budget, limited, free)
        report(None, free, free)
        if options.plot:
            draw(rows, free, options.plot)


def run_under(base: dict[str, object], budget: int | None, place: Path) -> RunResult:
    limit = {} if budget is None else {"memory.gpu_mem": f"{budget}B"}
    places = {"out": str(place / f"run-{budget}"), "cache.dir": str(place / "cache")}
    return run(resolve(overrides={**base, **limit, **places}))


def report(budget: int | None, limited: RunResult, free: RunResult) -> None:
    peak, seconds = totals(limited)
    losses = [(a.best_loss, b.best_loss) for a, b in zip(limited.state.stages, free.state.stages, strict=True)]
    loss = max(abs(a - b) for a, b in losses)
    off = ", ".join(f"{distance:.0e}" for distance in distances(limited, free))
    shown = "none" if budget is None else f"{budget / 1e6:.2f}"
    print(f"| {shown} | {peak / 1e6:.2f} | {seconds:.1f} | {off} | {loss:.1e} |", flush=True)


def totals(result: RunResult) -> tuple[int, float]:
    stages = result.state.stages
    return max(record.peak_bytes or 0 for record in stages), sum(record.seconds for record in stages)


def distances(one: RunResult, other: RunResult) -> list[float]:
    """For each stage: norm of the difference of its weights, over their norm."""
    return [
        _distance(load_stages(one.paths, [record]), load_stages(other.paths, [same]))
        for record, same in zip(one.state.stages, other.state.stages, strict=True)
    ]


def _distance(first: Arrays, second: Arrays) -> float:
    off = sum(float(np.square(first[name].astype(np.float64) - second[name]).sum()) for name in first)
    norm = sum(float(np.square(value.astype(np.float64)).sum()) for value in second.values())
    return (off / norm) ** 0.5


def draw(rows: list[tuple[int, RunResult]], free: RunResult, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    budgets = [budget / 1e6 for budget, _ in rows]
    axes.plot(budgets, [totals(result)[1] for _, result in rows], marker="o", label="under the budget")
    axes.axhline(totals(free)[1], linestyle="--", color="gray", label="no budget")
    axes.set(xlabel="budget, MB", ylabel="training and caching, s", ylim=(0, None))
    axes.legend()
    twin = axes.twinx()
    for stage, off in enumerate(zip(*(distances(result, free) for _, result in rows), strict=True), start=1):
        twin.plot(budgets, off, marker="x", color="tab:red", alpha=1 - 0.13 * (stage - 1))
    twin.axhline(1e-4, linestyle=":", color="tab:red")
    twin.set(ylabel="weights of stages 1 to 6 off by (pale: higher)", yscale="log", ylim=(1e-9, 1e-3))
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()

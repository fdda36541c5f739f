"""Training stage by stage against all stages at once: how far apart they are, and what brings them together.

python benchmarks/gap.py [--recipe fsdd --data fsdd:DIR --label digit] [--max-epochs 14] [--seeds 3] [--out runs/gap]

--plain names the comparison with unchanged options, where benchmarks/results.py has made one already.

The inputs of a stage above the first never change while it trains stage by stage, so it may learn them by heart. Held-out
minus training loss of the last epoch shows how much of that there is; probes show whether it matters. Goes on where it
was stopped.
"""

import argparse
import json
import statistics
from pathlib import Path

from layerwise.config import resolve
from layerwise.evaluate.compare import compare
from layerwise.evaluate.methods import GREEDY

SIMULTANEOUS = "greedy-infomax-simultaneous"
VARIANTS = {
    "all at once": (SIMULTANEOUS, {}),
    "stage by stage": (GREEDY, {}),
    "input noise 0.1": (GREEDY, {"training.input_noise": 0.1}),
    "input noise 0.3": (GREEDY, {"training.input_noise": 0.3}),
    "frame dropout 0.1": (GREEDY, {"training.frame_dropout": 0.1}),
    "two views": (GREEDY, {"data.views": 2}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--label", default="speaker")
    parser.add_argument("--max-epochs", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/gap"))
    parser.add_argument("--plain", type=Path)
    options = parser.parse_args()
    print(f"{options.data}, {options.label}, {options.max_epochs} epochs a module, {options.seeds} seeds\n")
    print(
        "| training | error after each module, % | held-out - training loss of each stage | s |\n| --- | --- | --- | --- |"
    )
    for name, (method, changes) in VARIANTS.items():
        overrides = {"data.source": options.data, "training.max_epochs": options.max_epochs}
        plain = options.plain or options.out / "plain"
        out = options.out / name.replace(" ", "-") if changes else plain
        config = resolve(options.recipe, overrides={**overrides, **changes, "out": str(out)})
        compared = compare(config, options.label, seeds=range(options.seeds), methods=[method])
        found = next(each for each in compared.methods if each.method == method)
        errors = " ".join(f"{100 * stage.error_mean:.1f}±{100 * stage.error_std:.1f}" for stage in found.stages)
        gaps = " ".join(f"{gap:.3f}" for gap in overfitting(Path(config.out) / "runs" / method))
        print(f"| {name} | {errors} | {gaps} | {found.seconds:.0f} |", flush=True)


def overfitting(runs: Path) -> list[float]:
    """Held-out minus training loss of the last epoch of each stage, mean over the seeds."""
    per_seed = [[_gap(path) for path in sorted(seed.glob("stages/*/metrics.jsonl"))] for seed in sorted(runs.iterdir())]
    return [statistics.mean(of_stage) for of_stage in zip(*per_seed, strict=True)]


def _gap(metrics: Path) -> float:
    last = json.loads(metrics.read_text().splitlines()[-1])
    return last["held_out_loss"] - last["loss"]


if __name__ == "__main__":
    main()

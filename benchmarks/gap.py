"""Training stage by stage against all stages at once: how far apart they are, and what brings them together.

python benchmarks/gap.py [--recipe fsdd --data fsdd:DIR --label digit] [--max-epochs 14] [--seeds 3] [--out runs/gap]

--plain names the comparison with unchanged options, where benchmarks/results.py has made one already.

The inputs of a stage above the first never change while it trains stage by stage, so it may learn them by heart. Then its
held-out loss rises again: how far, from its lowest to its last epoch, stands beside the errors of the probes. Training
losses would not show it, for noise and dropout make them harder. All at once, the loss is the mean of the modules. Goes on
where it was stopped.
"""

import argparse
import json
import statistics
from pathlib import Path

from layerwise.config import resolve
from layerwise.data.open import open_data
from layerwise.evaluate.compare import compare
from layerwise.evaluate.results import GREEDY
from layerwise.nets import shortest_sample

SIMULTANEOUS = "greedy-infomax-simultaneous"
VARIANTS: dict[str, tuple[str, dict[str, float]]] = {
    "all at once": (SIMULTANEOUS, {}),
    "stage by stage": (GREEDY, {}),
    "input noise 0.1": (GREEDY, {"training.input_noise": 0.1}),
    "input noise 0.3": (GREEDY, {"training.input_noise": 0.3}),
    "frame dropout 0.1": (GREEDY, {"training.frame_dropout": 0.1}),
    "twice the views": (GREEDY, {"data.views": 2}),
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
        "| training | error after each module, % | rise of the held-out loss of each stage | s |\n| --- | --- | --- | --- |"
    )
    source = resolve(options.recipe, overrides={"data.source": options.data})
    own = open_data(source.data, shortest_sample(source)).views
    for name, (method, changes) in VARIANTS.items():
        overrides = {"data.source": options.data, "training.max_epochs": options.max_epochs}
        plain = options.plain or options.out / "plain"
        out = options.out / name.replace(" ", "-") if changes else plain
        changes = {key: value * own if key == "data.views" else value for key, value in changes.items()}
        config = resolve(options.recipe, overrides={**overrides, **changes, "out": str(out)})
        compared = compare(config, options.label, seeds=range(options.seeds), methods=[method])
        found = next(each for each in compared.methods if each.method == method)
        errors = " ".join(f"{100 * stage.error_mean:.1f}±{100 * stage.error_std:.1f}" for stage in found.stages)
        rises = " ".join(f"{rise:.3f}" for rise in overfitting(Path(config.out) / "runs" / method))
        print(f"| {name} | {errors} | {rises} | {found.seconds:.0f} |", flush=True)


def overfitting(runs: Path) -> list[float]:
    """Held-out loss of the last epoch of each stage minus its lowest one, mean over the seeds."""
    per_seed = [
        [_rise(path) for path in sorted(seed.glob("stages/*/metrics.jsonl"))] for seed in sorted(runs.iterdir())
    ]
    return [statistics.mean(of_stage) for of_stage in zip(*per_seed, strict=True)]


def _rise(metrics: Path) -> float:
    losses = [json.loads(line)["held_out_loss"] for line in metrics.read_text().splitlines()]
    return losses[-1] - min(losses)


if __name__ == "__main__":
    main()

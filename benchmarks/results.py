"""The methods of the paper on real data: writes docs/results.md and its figures.

python benchmarks/results.py [--demo] [--fsdd DIR] [--cifar10 DIR] [--seeds 3] [--out runs/results]

Takes hours; the same command goes on where it was stopped, and writes the page anew after every data set.
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.config import Config, resolve
from layerwise.engines.machine import machine
from layerwise.evaluate.compare import Comparison, compare
from layerwise.report.html import write_report
from layerwise.units import duration, size

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Experiment:
    """One data set."""

    name: str
    title: str
    label: str
    epochs: int
    """Of each module of each method."""
    overrides: dict[str, str]
    recipe: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the synthetic corpus, too")
    parser.add_argument("--fsdd", help="the Free Spoken Digit Dataset")
    parser.add_argument("--cifar10", help="class folders of CIFAR-10 pictures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    options = parser.parse_args()
    sections = []
    for experiment in chosen(options):
        overrides = {"out": str(options.out / experiment.name), "training.max_epochs": experiment.epochs}
        config = resolve(experiment.recipe, overrides=overrides | experiment.overrides)
        found = compare(config, experiment.label, seeds=range(options.seeds), tell=print)
        write_report(config.out)
        shutil.copy(Path(config.out) / "plots" / "errors.svg", DOCS / f"results-{experiment.name}.svg")
        sections.append(section(experiment, config, found))
        (DOCS / "results.md").write_text(page(sections))


def chosen(options: argparse.Namespace) -> list[Experiment]:
    experiments = []
    if options.demo:
        experiments.append(Experiment("demo", "The demo", "speaker", 14, {}, "demo"))
    if options.fsdd:
        source = {"data.source": f"fsdd:{options.fsdd}"}
        experiments.append(Experiment("fsdd", "Free Spoken Digits", "digit", 8, source, "fsdd"))
    if options.cifar10:
        source = {"data.source": f"images:{options.cifar10}"}
        experiments.append(Experiment("cifar10", "A fifth of CIFAR-10", "class", 2, source, "cifar10"))
    return experiments


def page(sections: list[str]) -> str:
    about = machine(torch.device("cpu"))
    return "\n".join(
        [
            "# Results",
            "",
            "Made by `python benchmarks/results.py`. Test error, in %, of a linear probe on the frozen features after each",
            "module: mean and standard deviation over the seeds. Every module of every method is trained for the same number",
            f"of epochs. Peaks are of the device, disks of the caches; medians over the seeds. {about['cores']} cores of",
            f"{about['cpu']}, torch {about['torch']}.",
            "",
            *sections,
        ]
    )


def section(experiment: Experiment, config: Config, found: Comparison) -> str:
    modules = max(len(method.stages) for method in found.methods)
    lines = [
        f"## {experiment.title}, {experiment.label}",
        "",
        f"{experiment.epochs} epochs a module, {len(found.methods[0].seeds)} seeds, width {config.net.width}.",
        "",
        f"![error per module](results-{experiment.name}.svg)",
        "",
        f"| method | {' | '.join(map(str, range(1, modules + 1)))} | peak | disk | time |",
        f"| --- |{' --- |' * (modules + 3)}",
    ]
    for method in found.methods:
        errors = [f"{100 * stage.error_mean:.1f} ± {100 * stage.error_std:.1f}" for stage in method.stages]
        took = [size(method.peak_bytes), size(method.disk_bytes), duration(method.seconds)]
        lines.append(f"| {' | '.join([method.method, *errors, *(took if method.seconds else ['', '', ''])])} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()

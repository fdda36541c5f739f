"""The methods of the paper on real data: prints sections of docs/results.md, and draws its figures.

python benchmarks/results.py [--fsdd DIR] [--cifar10 DIR] [--demo] [--rounds] [--seeds 3] [--out runs/results]

Takes hours; the same command goes on where it was stopped. What an earlier start has compared in --out is printed, too.
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.config import load, resolve
from layerwise.engines.machine import machine
from layerwise.evaluate.compare import compare
from layerwise.evaluate.results import GREEDY, METHODS, UNTRAINED, Comparison, load_comparison
from layerwise.report.html import write_report
from layerwise.units import duration, size

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Experiment:
    """One data set; its recipe has its name."""

    name: str
    title: str
    label: str
    epochs: int
    """Of each module of each method."""
    note: str


EXPERIMENTS = (
    Experiment(
        "fsdd", "Free Spoken Digits", "digit", 8, "300 test recordings; two processes of one thread side by side."
    ),
    Experiment(
        "cifar10",
        "CIFAR-10, whole pictures",
        "class",
        2,
        "2000 test pictures; two processes of one thread side by side.",
    ),
    Experiment(
        "demo",
        "The demo",
        "speaker",
        7,
        "512 test utterances, the same for all seeds; one process of two threads.",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the synthetic corpus, too")
    parser.add_argument("--rounds", action="store_true", help="Free Spoken Digits in several rounds, too")
    parser.add_argument("--fsdd", help="the Free Spoken Digit Dataset")
    parser.add_argument("--cifar10", help="class folders of CIFAR-10 pictures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    options = parser.parse_args()
    sources = {
        "fsdd": options.fsdd and f"fsdd:{options.fsdd}",
        "cifar10": options.cifar10 and f"images:{options.cifar10}",
        "demo": options.demo and "demo",
    }
    for experiment in EXPERIMENTS:
        out, source = options.out / experiment.name, sources[experiment.name]
        if source:
            overrides = {"out": str(out), "training.max_epochs": experiment.epochs, "data.source": source}
            config = resolve(experiment.name, overrides=overrides)
            compare(config, experiment.label, seeds=range(options.seeds), methods=tuple(METHODS), tell=print)
            write_report(out)
            shutil.copy(out / "plots" / "errors.svg", DOCS / f"results-{experiment.name}.svg")
    for rounds in ROUNDS[1:] if options.rounds else ():
        changes = {"training.rounds": rounds, "training.max_epochs": EXPERIMENTS[0].epochs}
        overrides = {"out": str(rounds_folder(options.out, rounds)), "data.source": sources["fsdd"], **changes}
        config = resolve("fsdd", overrides=overrides)
        compare(config, EXPERIMENTS[0].label, seeds=range(options.seeds), methods=[GREEDY], tell=print)
    sections = [section(each, options.out / each.name) for each in EXPERIMENTS if known(options.out / each.name)]
    print("\n".join([on_machine(), "", *sections, *rounds_section(options.out)]))


def rounds_folder(out: Path, rounds: int) -> Path:
    """One round is training stage by stage, as it was compared with other methods."""
    return out / ("fsdd" if rounds == 1 else f"fsdd-rounds-{rounds}")


def rounds_section(out: Path) -> list[str]:
    there = [rounds for rounds in ROUNDS if known(rounds_folder(out, rounds))]
    if there in ([], [1]):
        return []
    rows = []
    for rounds in there:
        found = load_comparison(rounds_folder(out, rounds))
        (ours,) = (method for method in found.methods if method.method == GREEDY)
        errors = [
            f"{100 * stage.error_mean:.1f}" + (f" ± {100 * stage.error_std:.1f}" if len(ours.seeds) > 1 else "")
            for stage in ours.stages
        ]
        rows.append(f"| {rounds} | {len(ours.seeds)} | {' | '.join(errors)} |")
    modules = range(1, len(ours.stages) + 1)
    return [
        "## Rounds, Free Spoken Digits, digit",
        "",
        f"Greedy InfoMax with the same {found.epochs} epochs a module in so many rounds (`--rounds`): after each, a module",
        "goes on from the newest outputs of the one below, so that all of them can train at the same time. Error in %.",
        "",
        f"| rounds | seeds | {' | '.join(map(str, modules))} |",
        f"| --- | --- |{' --- |' * len(modules)}",
        *rows,
        "",
    ]


ROUNDS = (1, 2, 4, 8)


def known(out: Path) -> bool:
    """Whether a comparison lies there, of this start or of an earlier one."""
    return (out / "compare.json").exists()


def on_machine() -> str:
    about = machine(torch.device("cpu"))
    return f"{about['cores']} cores of {about['cpu']}, torch {about['torch']}."


def section(experiment: Experiment, out: Path) -> str:
    found, width = load_comparison(out), load(out / "config.toml").net.width
    modules = max(len(method.stages) for method in found.methods)
    lines = [
        f"## {experiment.title}, {experiment.label}",
        "",
        f"{found.epochs} epochs a module, {len(found.methods[0].seeds)} seeds, width {width}. {experiment.note}",
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
    return "\n".join([*lines, "", *goals(found), ""])


def goals(found: Comparison) -> list[str]:
    """What we wanted to see of Greedy InfoMax stage by stage, and what was seen; points of the mean error."""
    means = {each.method: [100 * stage.error_mean for stage in each.stages] for each in found.methods}
    ours = means[GREEDY]
    wanted = [
        ("against CPC", "cpc", "at most 0", lambda difference: difference <= 0),
        ("against CPC to convergence", "cpc-converged", "at most 0", lambda difference: difference <= 0),
        ("against all at once", "greedy-infomax-simultaneous", "at most 0.5", lambda difference: difference <= 0.5),
        ("against random weights", UNTRAINED, "below 0", lambda difference: difference < 0),
    ]
    lines = [
        f"| points of error | goal | {' | '.join(map(str, range(1, len(ours) + 1)))} | reached |",
        f"| --- | --- |{' --- |' * (len(ours) + 1)}",
    ]
    for title, other, goal, holds in wanted:
        if other not in means:
            continue
        differences = [mine - theirs for mine, theirs in zip(ours, means[other], strict=True)]
        missed = [
            str(stage) for stage, difference in enumerate(differences, start=1) if not holds(round(difference, 9))
        ]
        reached = f"not at {', '.join(missed)}" if missed else "yes"
        lines.append(f"| {title} | {goal} | {' | '.join(f'{each:+.1f}' for each in differences)} | {reached} |")
    fall = ours[-1] - ours[0]
    reached = "yes" if fall < 0 else "no"
    return [
        *lines,
        "",
        f"From the first module to the last the error changes by {fall:+.1f} points (goal: below 0): {reached}.",
    ]


if __name__ == "__main__":
    main()

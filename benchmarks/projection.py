"""Predictors that see a projection to P channels: what they cost in accuracy, and what they save.

python benchmarks/projection.py --data fsdd:DIR --results FILE [--projections 0 64 32] [--max-epochs 6] [--seeds 3]
python benchmarks/projection.py --data fsdd:DIR --results FILE --test 0 64
python benchmarks/projection.py --cost

Digit error of a linear probe after each module, recipe fsdd; P = 0 is the form of the paper. The customary test recordings
take no part in training nor in the choice of P: probes are tested on a ninth of the others, the recordings 5 to 9 of each
digit and speaker. --test probes the customary test recordings with the encoders that are there. Each run adds a line
to the file of results, and a second start does only what is missing there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from steps import machine, peak_of
from torch.utils.flop_counter import FlopCounterMode

from layerwise.config import Config, resolve
from layerwise.data.open import open_data
from layerwise.data.source import DataSet, SampleSet, digest
from layerwise.engines.run import UserObjects, run
from layerwise.evaluate.classifiers import fit_and_test
from layerwise.evaluate.features import features_under_budget
from layerwise.evaluate.targets import probe_targets, probe_task
from layerwise.memory.plan import WIDE_ROOM
from layerwise.nets import build_network, shortest_sample
from layerwise.objectives.contrastive import InfoNCE
from layerwise.run_store import open_run
from layerwise.stop import StopFlag
from layerwise.training.cache_retention import remove_caches
from layerwise.training.encoder import load_encoder
from layerwise.training.forward import trained_stages
from layerwise.training.spec import stage_specs

VALIDATION = ("5", "6", "7", "8", "9")
"""Numbers of the recordings that stand for the test recordings while P is chosen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the Free Spoken Digit Dataset, fsdd:DIR")
    parser.add_argument("--results", type=Path, default=Path("runs/projection.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/projection"))
    parser.add_argument("--projections", type=int, nargs="+", default=[0, 64, 32])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--max-epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, nargs="+", help="these P on the customary test recordings")
    parser.add_argument(
        "--cost", action="store_true", help="memory, work and time of the loss at the paper's width alone"
    )
    options = parser.parse_args()
    if options.cost:
        print_cost(options.projections)
        return
    configs = [
        config_of(options, projection, seed)
        for seed in range(options.seeds)
        for projection in options.test or options.projections
    ]
    part = "test" if options.test else "validation"
    for config in configs:
        if find(options.results, config, part) is None:
            line = tested(config) if options.test else trained(config)
            with options.results.open("a") as file:
                file.write(json.dumps(described(config, part) | line) + "\n")
    print_errors(options.results, configs, part)


def config_of(options: argparse.Namespace, projection: int, seed: int) -> Config:
    folder = options.out / f"width-{options.width}-epochs-{options.max_epochs}" / f"projection-{projection}-seed-{seed}"
    changes = {
        "out": str(folder),
        "cache.dir": str(folder / "caches"),
        "data.source": options.data,
        "net.width": options.width,
        "net.context": options.width,
        "objective.projection": projection,
        "training.max_epochs": options.max_epochs,
        "training.seed": seed,
        "training.stages": 6,
        "training.device": "cpu",
    }
    return resolve("fsdd", overrides=changes)


def described(config: Config, part: str) -> dict[str, object]:
    """What tells the lines of the results apart."""
    training = config.training
    return {
        "part": part,
        "width": config.net.width,
        "max_epochs": training.max_epochs,
        "projection": config.objective.projection,
        "seed": training.seed,
    }


def find(results: Path, config: Config, part: str) -> dict[str, object] | None:
    lines = map(json.loads, results.read_text().splitlines()) if results.exists() else ()
    wanted = described(config, part).items()
    return next((line for line in lines if wanted <= line.items()), None)


def without_test(data: SampleSet) -> SampleSet:
    """The training recordings alone; those of VALIDATION are what probes are tested on."""
    kept = np.flatnonzero(~data.test)
    ids = [data.ids[number] for number in kept]
    return replace(
        data,
        ids=ids,
        lengths=data.lengths[kept],
        identity=digest(f"without test {data.identity}"),
        read_values=lambda sample, *place: data.read_values(int(kept[sample]), *place),
        labels={name: values[kept] for name, values in data.labels.items()},
        test=np.array([Path(name).stem.split("_")[-1] in VALIDATION for name in ids]),
    )


def trained(config: Config) -> dict[str, object]:
    """Trains where that is not done, and probes the validation recordings."""
    data = without_test(open_data(config.data, shortest_sample(config)))
    result = run(config, UserObjects(data=data))
    remove_caches(Path(config.out), None)
    stages = result.state.stages
    return {
        "errors": errors(config, data),
        "seconds": [round(stage.seconds, 1) for stage in stages],
        "epochs": [stage.epochs for stage in stages],
        "peak_bytes": [stage.train_peak_bytes for stage in stages],
    }


def tested(config: Config) -> dict[str, object]:
    """Probes the test recordings; the classifier sees all others."""
    return {"errors": errors(config, open_data(config.data, shortest_sample(config)))}


def errors(config: Config, data: DataSet) -> list[float]:
    """Of a linear probe after each module."""
    store, state = open_run(Path(config.out))
    weights, origin = load_encoder(store.encoder, state.encoder)
    network = build_network(config.net, data.frame_shape, config.training.seed)
    specs = stage_specs(config, data, network, network.natural_ranges)
    task = probe_task("digit", data, config)
    files, _ = features_under_budget(
        config, task, trained_stages(specs, origin.handings, weights), store.probes, StopFlag()
    )
    return [
        fit_and_test(features, probe_targets(task, spec), "linear")[0]
        for spec, features in zip(specs, files, strict=True)
    ]


def print_errors(results: Path, configs: list[Config], part: str) -> None:
    print(f"| P | {part} error after each module, % | mean of the modules | training, s |\n| --- | --- | --- | --- |")
    for projection in dict.fromkeys(config.objective.projection for config in configs):
        found = [find(results, config, part) for config in configs if config.objective.projection == projection]
        per_stage = [*zip(*(line["errors"] for line in found), strict=True)]
        means = [statistics.mean(line["errors"]) for line in found]
        seconds = f"{statistics.median(sum(line['seconds']) for line in found):.0f}" if part == "validation" else ""
        print(f"| {projection or 'none'} | {' '.join(map(percent, per_stage))} | {percent(means)} | {seconds} |")


def percent(errors: Sequence[float]) -> str:
    """Mean and spread over the seeds."""
    return f"{100 * statistics.mean(errors):.1f}±{100 * statistics.pstdev(errors):.1f}"


FRAMES = (4095, 1023, 511, 255, 128, 128)
"""That each module of the paper's speech network puts out of a window."""


def print_cost(projections: list[int]) -> None:
    """Of one step of the loss with its gradients at the paper's width and batch, without the optimizer's step."""
    torch.set_num_threads(1)
    print(f"{machine(torch.device('cpu'))}\n")
    print(
        "| P | trained numbers, stages 1 to 5, 6 | with gradients and Adam, MB | peak of the loss, stage 2, MB "
        "| GFLOP, stage 2 | GFLOP, all six | CPU s, all six |"
    )
    print(f"|{' --- |' * 7}")
    steps = [[loss_step(projection, stage) for stage in range(1, 7)] for projection in projections]
    seconds = cpu_seconds_in_turn([[step for _, step in of_one] for of_one in steps], rounds=5)
    for projection, of_one, took in zip(projections, steps, seconds, strict=True):
        first, last = (numbers_of(of_one[stage - 1][0]) for stage in (1, 6))
        work = [flops(step) / 1e9 for _, step in of_one]
        peak = peak_of(lambda _, projection=projection: loss_step(projection, 2)[1], torch.device("cpu"))
        print(
            f"| {projection or 'none'} | {first:,}, {last:,} | {16 * first / 1e6:.1f}, {16 * last / 1e6:.1f} "
            f"| {peak / 1e6:.1f} | {work[1]:.1f} | {sum(work):.1f} | {took:.2f} |"
        )


def numbers_of(objective: InfoNCE) -> int:
    return sum(value.numel() for value in objective.parameters())


def cpu_seconds_in_turn(ways: Sequence[Sequence[Callable[[], None]]], rounds: int) -> list[float]:
    """Median processor seconds of each way, which is several steps; they take turns, after a round that is not counted."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for steps, of_way in zip(ways, times, strict=True):
            started = time.process_time()
            for step in steps:
                step()
            of_way.append(time.process_time() - started)
    return [statistics.median(of_way[1:]) for of_way in times]


def loss_step(projection: int, stage: int, samples: int = 8) -> tuple[InfoNCE, Callable[[], None]]:
    """InfoNCE of a stage of the paper's network, and one pass through it and its gradients."""
    torch.manual_seed(0)
    frames, channels, context, shared = FRAMES[stage - 1], 512, 256 if stage == 6 else 512, stage < 6
    objective = InfoNCE(channels, context, 12, projection=projection, shared=shared)
    draw = objective.draw(np.full(samples, frames), frames, 1, np.random.default_rng(0))[0]
    targets = (0.3 * torch.randn(len(draw.rows), channels)).requires_grad_()
    contexts = targets if shared else (0.3 * torch.randn(len(draw.rows), context)).requires_grad_()

    def step() -> None:
        objective(targets, contexts, draw, WIDE_ROOM).loss.backward()
        objective.zero_grad()
        targets.grad = contexts.grad = None

    return objective, step


def flops(step: Callable[[], None]) -> int:
    """Of all matrix products."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place}) as counter:
        step()
    return counter.get_total_flops()


def added_in_place(_: torch.Size, left: torch.Size, right: torch.Size, **others: object) -> int:
    """PyTorch's counter knows the product that is added to a new tensor alone."""
    return 2 * left[0] * left[1] * right[1]


if __name__ == "__main__":
    start = time.monotonic()
    main()
    print(f"\n{time.monotonic() - start:.0f} s")

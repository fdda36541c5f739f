"""What else one may do to train under little device memory: peak, work, traffic, time, and whether it is the same training.

    python benchmarks/alternatives.py speech-8|speech-64|layers-24|layers-48|vit-l|resnet-1024|all
        [--device cpu] [--rounds 3] [--peaks-only] [--full]

Every row trains the network end to end with one InfoNCE loss at the top and exact gradients, but for layerwise's own, which
train it stage by stage. Peak, GFLOP and bytes come from a rehearsal of the very step on tensors without values. Then the step
is taken: its peak on the device, its time, in turns with the other rows, and its weights after two steps against those of
plain, relative, at the layer where they differ most. Where a step takes minutes on a CPU, that is done on a smaller copy of the
same shape, and on the network itself with --full.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from host import Host
from resident import AdamInBackward, MicroBatches, Plain
from steps import machine, seconds_in_turn
from streaming import Streaming
from workloads import SMALLER, WORKLOADS, Stages, Workload

from layerwise.cache.dtypes import STORED
from layerwise.config import Config, with_options
from layerwise.data.batches import Batch
from layerwise.memory.meter import REHEARSED_ON, meter_for, rehearsal
from layerwise.memory.plan import MemoryPlan
from layerwise.nets.network import ranges
from layerwise.training.budget import fit_stage, smallest_budget
from layerwise.training.context import RunContext
from layerwise.training.spec import StageSpec, stage_specs
from layerwise.training.trainer import StageTrainer, StepRandomness
from layerwise.training.training_peak import training_peak
from layerwise.training.work import step_flops, step_moved

CLOSE = 1e-4
"""Relative difference of weights above which two steps are not the same training."""

FLOPS_PER_BYTE = 64
"""By which layerwise chooses its layouts, the same on every machine."""


class Training(Protocol):
    """A way to train, ready for its first step."""

    def train(self, number: int) -> None:
        """Takes step `number`, from 0."""


Make = Callable[[Workload, Host], Training]


@dataclass(frozen=True)
class Rehearsed:
    """Of a step: bytes at the highest point, floating-point operations, bytes moved down and up."""

    peak: int
    flops: int
    moved: int


@dataclass(frozen=True)
class Row:
    """A way to train, as parts that are trained one after another: of an end-to-end way one, of layerwise its stages."""

    name: str
    parts: list[tuple[int, Make]]
    """How many of the kind there are, and how to make one."""
    end_to_end: bool = True
    """Whether it takes the step of plain, and has `weights()` to compare."""
    predicted: Rehearsed | None = None
    """Of layerwise: what it says itself."""


def rows_of(workload: Workload) -> Iterator[Row]:
    """All rows of the table; what another way needs is a line here."""

    def whole(name: str, make: Callable[..., Training], **options: Any) -> Row:
        return Row(name, [(1, partial(make, **options))])

    everything = workload.config.objective.steps
    yield whole("plain", Plain, recompute=False)
    yield whole("plain, each layer checkpointed", Plain, recompute=True)
    yield whole("the same, loss in blocks, Adam in the backward pass", AdamInBackward, adam_on_host=False)
    yield whole("the same, Adam on the host", AdamInBackward, adam_on_host=True)
    if workload.slices:
        yield whole("micro-batches of 1 (GradCache)", MicroBatches, recompute=False, adam_on_host=False)
        yield whole("the same, checkpointed, Adam on the host", MicroBatches, recompute=True, adam_on_host=True)
    yield whole("layer-to-layer streaming", Streaming, predictors_at_once=everything)
    yield whole("the same, one predictor at a time", Streaming, predictors_at_once=1)
    if workload.inputs_first:
        yield whole(
            "the same, gradients of inputs before those of weights", Streaming, predictors_at_once=1, inputs_first=True
        )
    if workload.contexts_on_host:
        options = {"predictors_at_once": 1, "inputs_first": True, "contexts_on_host": True}
        yield whole("the same, contexts of the loss from the host", Streaming, **options)
    if workload.together:
        words = ", ".join(map(str, workload.together))
        options = {"together": workload.together, "contexts_on_host": workload.contexts_on_host}
        yield whole(f"the same, layers together by {words}", Streaming, predictors_at_once=1, **options)
    for stages in workload.stages:
        yield layerwise(workload, stages)


def layerwise(workload: Workload, stages: Stages) -> Row:
    """Stages as the planner lays them out."""
    layers, budget, projection = stages
    if projection is not None:
        workload = replace(workload, config=with_options(workload.config, {"objective.projection": projection}))
    count, device = len(workload.network.layers), REHEARSED_ON
    sizes = [layers] * (count // layers) + [count % layers] * (count % layers > 0)
    specs = stage_specs(workload.config, workload.data, workload.network, ranges(sizes))
    if budget == "smallest":
        limit: object = max(smallest_budget(workload.config, spec, device) for spec in specs)
    else:
        limit = budget
    limits = {} if limit is None else {"memory.gpu_mem": limit, "memory.flops_per_byte": FLOPS_PER_BYTE}
    config = with_options(workload.config, limits)
    kinds: dict[object, list[StageSpec]] = {}
    for spec in specs:
        kinds.setdefault(spec.alike, []).append(spec)
    parts: list[tuple[int, Make]] = []
    peak = flops = moved = 0
    for alike in kinds.values():
        plan = fit_stage(config, alike[0], device)
        if plan is None:
            raise SystemExit(f"stage {alike[0].stage} does not fit into {budget}")
        parts.append((len(alike), partial(LayerwiseStage, config=config, spec=alike[0], plan=plan)))
        peak = max(peak, training_peak(config, alike[0], plan).bytes)
        flops += len(alike) * step_flops(config, alike[0], plan)
        moved += len(alike) * step_moved(config, alike[0], plan)
    under = "whole batch" if budget is None else f"--gpu-mem {budget}" if budget != "smallest" else "smallest budget"
    projected = "" if projection is None else f", projection {projection}"
    name = f"layerwise, {layers} layer{'s' if layers > 1 else ''} a stage{projected}, {under}"
    return Row(name, parts, end_to_end=False, predicted=Rehearsed(peak, flops, moved))


class LayerwiseStage:
    """A stage of a run; its batch is read from data or a cache."""

    def __init__(self, workload: Workload, host: Host, config: Config, spec: StageSpec, plan: MemoryPlan) -> None:
        context = RunContext(host.device, meter_for(host.device, None))
        self.trainer = StageTrainer(spec, config, plan, context)
        dtype = torch.float32 if spec.stage == 1 else STORED[config.cache.dtype].tensor
        shape = workload.batch_size, spec.window.frames, *spec.frame_shape
        self.batch = Batch(host.build(lambda: torch.randn(shape).to(dtype)), np.full(shape[0], shape[1]))

    def train(self, number: int) -> None:
        """Step `number`."""
        self.trainer.train(self.batch, StepRandomness(lambda: np.random.default_rng(number)))


def rehearsed(workload: Workload, row: Row) -> Rehearsed:
    """The largest peak over the parts of a row, and the sums of the others."""
    if row.predicted:
        return row.predicted
    peak = flops = moved = 0
    for count, make in row.parts:
        with rehearsal() as meter:
            host = Host(REHEARSED_ON, rehearsed=True)
            with host.flops:
                training = make(workload, host)
                host.moved = host.flops.total = 0
                training.train(0)
            del training
        peak, flops, moved = max(peak, meter.peak), flops + count * host.flops.total, moved + count * host.moved
    return Rehearsed(peak, flops, moved)


@dataclass(frozen=True)
class Measured:
    """Of real steps: bytes at the highest point, seconds, and how far weights are from those of plain after two steps."""

    peak: int
    seconds: float
    off: float | None


def measured(workload: Workload, rows: list[Row], device: torch.device, rounds: int) -> list[Measured]:
    """One for each row; plain is the first."""
    peaks, trainings, plain, off = [], [], None, []
    for row in rows:
        peaks.append(0)
        for _, make in row.parts:
            meter = meter_for(device, None)
            with meter:
                training = make(workload, Host(device))
                training.train(0)
            training.train(1)
            peaks[-1] = max(peaks[-1], meter.peak)
            trainings.append(training)
        weights = [[t.cpu().double() for t in layer] for layer in training.weights()] if row.end_to_end else None
        plain = plain or weights
        off.append(None if weights is None else largest_difference(weights, plain))
        del weights
    del plain
    seconds = iter(seconds_in_turn([partial(training.train, 2) for training in trainings], device, rounds))
    of_rows = [sum(count * next(seconds) for count, _ in row.parts) for row in rows]
    return [Measured(*each) for each in zip(peaks, of_rows, off, strict=True)]


def largest_difference(ours: list[list[torch.Tensor]], plain: list[list[torch.Tensor]]) -> float:
    """Norm of the difference over the norm, at the layer where it is largest."""
    return max(
        (sum(float((a - b).square().sum()) for a, b in zip(*layers, strict=True)) ** 0.5)
        / (sum(float(b.square().sum()) for b in layers[1]) ** 0.5)
        for layers in zip(ours, plain, strict=True)
    )


def print_table(name: str, workload: Workload, device: torch.device | None, rounds: int) -> None:
    """device: where steps are taken too, or None. Raises SystemExit where a row is not the training that plain is."""
    rows = list(rows_of(workload))
    print(f"{name}\n\n| | peak MB | GFLOP | MB moved | measured MB | s | weights off by |\n|{' --- |' * 7}", flush=True)
    steps = measured(workload, rows, device, rounds) if device else [None] * len(rows)
    for row, step in zip(rows, steps, strict=True):
        counted = rehearsed(workload, row)
        taken = "| | |"
        if step:
            off = "" if step.off is None else f"{step.off:.0e}"
            taken = f"| {step.peak / 1e6:.1f} | {step.seconds:.3f} | {off} |"
        print(
            f"| {row.name} | {counted.peak / 1e6:.1f} | {counted.flops / 1e9:.0f} | {counted.moved / 1e6:.0f} {taken}",
            flush=True,
        )
    print(flush=True)
    wrong = [row.name for row, step in zip(rows, steps, strict=True) if step and (step.off or 0) > CLOSE]
    if wrong:
        raise SystemExit(f"{name}: not the weights of plain, by more than {CLOSE}: {', '.join(wrong)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=[*WORKLOADS, "all"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peaks-only", action="store_true", help="rehearse, and take no step")
    parser.add_argument("--full", action="store_true", help="take steps of the largest networks too")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # its rounding would hide whether two trainings are the same
    print(f"{machine(device)}\n")
    for name in WORKLOADS if options.workload == "all" else [options.workload]:
        on_copy = name in SMALLER and not options.full
        print_table(name, WORKLOADS[name](), None if on_copy or options.peaks_only else device, options.rounds)
        if on_copy and not options.peaks_only:
            print_table(f"{name}, a smaller copy", SMALLER[name](), device, options.rounds)


if __name__ == "__main__":
    main()

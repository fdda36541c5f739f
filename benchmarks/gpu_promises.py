"""What layerwise promises of a GPU, each promise as a check, in the order of importance; `gpu_check.py` runs them.

Runs are those of the paper's speech network on noise, whose figures are those of speech.
"""

import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import alternatives
import numpy as np
import torch
from checks import Check, Findings, NotMeasured
from driver_watch import DriverWatch
from gpu_trace import Traced, Tracer
from safetensors.numpy import load_file
from steps import natural_stages, our_stage, paper
from workloads import Stages, Workload

from layerwise import load
from layerwise.cache import ActivationCache
from layerwise.config import OWN, Config, with_options
from layerwise.data.open import as_data
from layerwise.data.source import DataSet
from layerwise.engines.machine import machine
from layerwise.engines.plan import plan
from layerwise.engines.run import RunResult, UserObjects, run
from layerwise.errors import Interrupted
from layerwise.events import EpochDone, Event, StageDone, StageStarted, StepDone
from layerwise.memory.device import release
from layerwise.memory.driver import context_bytes
from layerwise.memory.meter import meter_for
from layerwise.memory.plan import NARROW_ROOM, ROOMS, MemoryPlan
from layerwise.nets import build_network
from layerwise.run_store import RunStore
from layerwise.stop import StopFlag
from layerwise.training.spec import StageSpec

CPU = torch.device("cpu")

CLOSE = 1e-4
"""Relative difference of weights, and of losses in exact float32, above which two trainings are not the same."""
LOSSES_AGREE = 1e-3
"""Relative difference of losses between two devices, each at the precision that runs have."""
FEATURES_AGREE = 2e-2
"""Relative difference between float16 caches, each made from the one below, and the encoder in float32."""
KERNELS, COPIES, WAITS = 80, 2, 0.1
"""Most in a step that keeps a fast card busy."""
LOADED_LATER = 8 * 2**20
"""Bytes that the driver may take for kernels which the first run of a process did not need."""

SMALL = {
    "net.width": 8,
    "net.context": 8,
    "net.kernels": (10, 8),
    "net.strides": (5, 4),
    "net.paddings": (2, 2),
    "data.window": 160,
    "objective.steps": 1,
    "objective.negatives": 4,
    "objective.anchors": 8,
    "objective.gap": 0,
    "cache.block": "4kB",
}
AS_IT_IS = {"memory.recompute": "never", "memory.optimizer": "device"}
"""With a micro-batch this is one layout, so that none has to be looked for."""


@dataclass(frozen=True)
class Size:
    """How large everything is that is checked."""

    changes: dict[str, Any]
    """Of the options of the paper's run."""
    batches: tuple[int, int]
    """A small batch and a large one."""
    traced: tuple[tuple[int, int], tuple[int, int]]
    """Samples and epochs of the runs that are looked at while they train; seven in ten samples train, in whole batches."""
    stages: tuple[int, ...]
    """Which of them take single steps; others are like these."""
    rounds: int
    """Of the table with other ways to train."""


SIZES = {
    "paper": Size({}, (8, 64), ((200, 2), (445, 4)), (0, 1, 5), 5),
    "small": Size(SMALL, (4, 8), ((28, 2), (34, 2)), (0, 2), 1),
}


@dataclass(frozen=True)
class Trace:
    """Of a stage of a run: its steps, and its caching pass."""

    steps: Traced
    samples: int
    cache_bytes: int
    seconds: float
    """Of the caching pass."""


class Bench:
    """What the checks share: sizes, the device, a folder, and runs that several of them look at."""

    def __init__(self, size: str, folder: str) -> None:
        self.size, self.folder = SIZES[size], folder
        self.device = torch.device("cuda", 0)
        self.runs: list[RunResult] = []
        """Short runs with the same options, in folders of their own."""
        self.left: list[dict[str, int]] = []
        """Of each short run: what was on the device before and after it."""
        self._traced: dict[int, tuple[RunResult, DataSet, list[Trace]]] = {}

    def task(self, batch: int, samples: int, **changes: Any) -> tuple[Config, DataSet]:
        """Options and data of a run in a folder of its own."""
        place = tempfile.mkdtemp(dir=self.folder)
        places = {"out": f"{place}/run", "cache.dir": f"{place}/cache", "training.device": str(self.device)}
        given = {"data.source": OWN, "training.max_epochs": 1, **places, **self.size.changes, **changes}
        config, _ = paper("speech", batch, **given)
        noise = torch.randn(samples, config.data.window, 1, generator=torch.Generator().manual_seed(0))
        return config, as_data(noise, config.data)

    def stages(self) -> tuple[Config, list[StageSpec]]:
        """Of which single steps are taken, with the small batch."""
        config, data = paper("speech", self.size.batches[0], **self.size.changes)
        specs = natural_stages(config, data)
        return config, [specs[number] for number in self.size.stages]

    def short_task(self) -> tuple[Config, DataSet]:
        """Of a run in two micro-batches."""
        batch = self.size.batches[0]
        return self.task(batch, 4 * batch, **{"memory.micro_batch": batch // 2}, **AS_IT_IS)

    def short_run(self, findings: Findings, task: tuple[Config, DataSet]) -> RunResult:
        """The run, or what is left of it where it was stopped."""
        release(self.device)
        before = self._on_device()
        with stopped_in_time(findings) as stop:
            result = run(task[0], UserObjects(data=task[1]), stop=stop)
        self.left.append({**{f"{name}_before": value for name, value in before.items()}, **self._on_device()})
        return result

    def short_runs(self, findings: Findings, count: int) -> list[RunResult]:
        """As many of them, with the same options."""
        while len(self.runs) < count:
            self.runs.append(self.short_run(findings, self.short_task()))
        return self.runs[:count]

    def traced(self, findings: Findings, large: bool) -> tuple[RunResult, DataSet, list[Trace]]:
        """A run, its data, and what was seen of its stages."""
        batch = self.size.batches[large]
        if batch not in self._traced:
            samples, epochs = self.size.traced[large]
            lasting = {"training.max_epochs": epochs, "training.patience": epochs}
            options = {"memory.micro_batch": batch, **lasting, **AS_IT_IS}
            config, data = self.task(batch, samples, **options)
            seen = _Watcher(epochs)
            with stopped_in_time(findings) as stop:
                result = run(config, UserObjects(data=data), notify=seen, stop=stop)
            traces = [
                Trace(steps, len(data.ids), record.cache_bytes or 0, seconds)
                for steps, record, seconds in zip(seen.steps, result.state.stages, seen.caching, strict=True)
            ]
            self._traced[batch] = result, data, traces
        return self._traced[batch]

    def _on_device(self) -> dict[str, int]:
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        return {"allocated": allocated, "reserved": reserved, "beside": total - free - reserved}


class _Watcher:
    """Traces each stage's steps, but for those of the first epoch, and takes the time of its caching pass."""

    def __init__(self, epochs: int) -> None:
        self.steps: list[Traced] = []
        self.caching: list[float] = []
        self._epochs = epochs

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.steps.append(Traced())
        elif isinstance(event, StepDone) and event.epoch and event.step == event.steps - 1:
            self.steps[-1] += self._tracer.stop(event.steps)
        elif isinstance(event, EpochDone):
            self._trained = time.perf_counter()
            if event.epoch < self._epochs:
                self._tracer = Tracer()
                self._tracer.start()
        elif isinstance(event, StageDone):
            self.caching.append(time.perf_counter() - self._trained)


@contextmanager
def stopped_in_time(findings: Findings) -> Iterator[StopFlag]:
    """A flag that is set when the share of the time is over. What that interrupts is not measured."""
    flag = StopFlag()
    timer = threading.Timer(max(findings.until - time.time(), 0), flag.ask, ("the end of its share of the time",))
    timer.daemon = True
    timer.start()
    try:
        yield flag
    except Interrupted as error:
        raise NotMeasured(str(error)) from None
    finally:
        timer.cancel()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, whose products have ten bits."""
    places = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def card(bench: Bench, findings: Findings) -> None:
    """The machine, and the precision that float32 has on it unless somebody says otherwise."""
    matrix = torch.arange(64.0).view(8, 8)
    computed = (matrix.to(bench.device) @ matrix.to(bench.device)).cpu()
    free, _ = torch.cuda.mem_get_info(bench.device)
    properties = torch.cuda.get_device_properties(bench.device)
    findings.add(
        bool(((computed - matrix @ matrix).abs() <= 0.01 * (matrix @ matrix)).all()),
        **machine(bench.device),
        capability=f"{properties.major}.{properties.minor}",
        free_bytes=free,
        context_bytes=context_bytes(bench.device),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        float32_of_convolutions=torch.backends.cudnn.conv.fp32_precision,
        float32_of_recurrent_layers=torch.backends.cudnn.rnn.fp32_precision,
        float32_of_products=torch.backends.cuda.matmul.fp32_precision,
    )


def memory(bench: Bench, findings: Findings, budget: str, large: bool) -> None:
    """Per stage: predicted, requested, reserved, and the driver's figure, by the allocator and as it was sampled."""
    batch = bench.size.batches[large]
    config, data = bench.task(batch, (2 if large else 4) * batch)
    free, _ = torch.cuda.mem_get_info(bench.device)
    limit = f"{plan(config, data=data).smallest_budget_bytes}B" if budget == "smallest" else budget
    config = with_options(config, {"memory.gpu_mem": limit})
    allowed = config.memory.gpu_mem or 0
    if allowed > free:
        raise NotMeasured(f"the card has {free / 1e6:.0f} MB free, and the budget is {allowed / 1e6:.0f} MB")
    findings.raise_if_over()
    forecast = plan(config, data=data)
    if not forecast.fits:
        raise NotMeasured(f"refused, as the smallest budget here is {forecast.smallest_budget_bytes / 1e6:.0f} MB")
    store = RunStore.of(config.out, config.cache.dir)

    def note(event: Event) -> None:
        if not isinstance(event, StageDone):
            return
        record, expected = store.load_state().record(event.stage), forecast.stages[event.stage - 1]
        assert record.train_peak_bytes and record.cache_peak_bytes and record.driver_bytes, "no peak was recorded"
        requested = record.train_peak_bytes, record.cache_peak_bytes
        predicted = expected.train_peak_bytes, expected.cache_peak_bytes
        sampled = watch.take()
        most = max(sampled, record.driver_bytes)
        findings.add(
            most <= allowed and all(r <= p for r, p in zip(requested, predicted, strict=True)),
            stage=event.stage,
            layout=expected.layout,
            micro_batch=record.micro_batch,
            predicted_mb=mega(predicted[0]),
            requested_mb=mega(requested[0]),
            caching_predicted_mb=mega(predicted[1]),
            caching_requested_mb=mega(requested[1]),
            reserved_mb=mega(record.allocator_bytes or 0),
            driver_mb=mega(record.driver_bytes),
            sampled_mb=mega(sampled),
            budget_mb=mega(allowed),
        )

    with stopped_in_time(findings) as stop, DriverWatch(bench.device) as watch:
        run(config, UserObjects(data=data), notify=note, stop=stop)


def layouts(bench: Bench, findings: Findings) -> None:
    """Weights after two steps, in micro-batches and streamed, against those of the whole batch."""
    config, specs = bench.stages()
    for spec in specs:
        _, weights, losses = two_steps(config, spec, whole_batch(config), bench.device)
        for layout in saving_layouts(config):
            findings.raise_if_over()
            trained, other_weights, other_losses = two_steps(config, spec, layout, bench.device)
            off = alternatives.largest_difference(other_weights, weights)
            findings.add(
                off <= CLOSE,
                stage=spec.stage,
                layout=str(trained),
                weights_off=float(f"{off:.1e}"),
                loss_off=float(f"{relative(other_losses[1], losses[1]):.1e}"),
            )


def layouts_exactly(bench: Bench, findings: Findings) -> None:
    """The same without TF32."""
    with exact_float32():
        layouts(bench, findings)


def against_cpu(bench: Bench, findings: Findings) -> None:
    """The loss of the first step, and of the second, which shows what the first one did."""
    config, specs = bench.stages()
    for spec in specs:
        findings.raise_if_over()
        *_, expected = two_steps(config, spec, whole_batch(config), CPU)
        *_, losses = two_steps(config, spec, whole_batch(config), bench.device)
        with exact_float32():
            *_, exact = two_steps(config, spec, whole_batch(config), bench.device)
        first, second = (relative(*pair) for pair in zip(losses, expected, strict=True))
        first_exact, second_exact = (relative(*pair) for pair in zip(exact, expected, strict=True))
        findings.add(
            max(first, second_exact) <= LOSSES_AGREE and first_exact <= CLOSE,
            stage=spec.stage,
            loss=round(expected[0], 5),
            off=float(f"{first:.1e}"),
            off_without_tf32=float(f"{first_exact:.1e}"),
            second_off=float(f"{second:.1e}"),
            second_off_without_tf32=float(f"{second_exact:.1e}"),
        )


def whole_batch(config: Config) -> MemoryPlan:
    return MemoryPlan(config.training.batch_size, config.training.batch_size)


def saving_layouts(config: Config) -> list[MemoryPlan]:
    """Each way to save memory, and all at once."""
    size = config.training.batch_size
    narrow = MemoryPlan(size, 1, loss_room=NARROW_ROOM)
    return [
        narrow,
        replace(narrow, micro_batch=size // 2, optimizer_on_host=True, gradients_wait=True),
        replace(narrow, parts=1),
        replace(narrow, optimizer_on_host=True, parts=size, predictors=1, loss_room=ROOMS[-1], gradients_at_once=True),
    ]


Weights = list[list[torch.Tensor]]


def two_steps(
    config: Config, spec: StageSpec, layout: MemoryPlan, device: torch.device
) -> tuple[MemoryPlan, Weights, list[float]]:
    """The layout at the end, which is another one where memory ran out; weights of module and objective; both losses."""
    torch.manual_seed(0)
    meter = meter_for(device, None)
    with meter:
        step = our_stage(config, spec, device, layout, meter)
        losses = [step().loss.item() for _ in range(2)]
        trainer = step.loaded
        weights = [
            [tensor.detach().cpu().double() for tensor in part.state_dict().values()]
            for part in (trainer.module, trainer.objective)
        ]
    return trainer.memory_plan, weights, losses


def relative(one: float, other: float) -> float:
    return abs(one - other) / abs(other)


def same_twice(bench: Bench, findings: Findings) -> None:
    """Bits of two runs with the same options."""
    compare_bits(findings, *bench.short_runs(findings, 2))


def resumed(bench: Bench, findings: Findings) -> None:
    """Bits of a run that was stopped in its second stage, and went on."""
    (expected,), task, stop = bench.short_runs(findings, 1), bench.short_task(), StopFlag()

    def ask(event: Event) -> None:
        if isinstance(event, StepDone) and event.stage == 2:
            stop.ask("the check")

    with suppress(Interrupted):
        run(task[0], UserObjects(data=task[1]), notify=ask, stop=stop)
    if RunStore.of(task[0].out, task[0].cache.dir).load_state().done:
        raise AssertionError("the run was not stopped, though it was asked to be")
    compare_bits(findings, expected, bench.short_run(findings, task))


def compare_bits(findings: Findings, one: RunResult, other: RunResult) -> None:
    """A row that says how many tensors of the encoder differ, and by how much."""
    names, others = load_file(one.paths.encoder), load_file(other.paths.encoder)
    assert names.keys() == others.keys(), "the runs made encoders of other tensors"
    different = [name for name, value in names.items() if value.tobytes() != others[name].tobytes()]
    off = max((float(np.abs(names[name] - others[name]).max()) for name in different), default=0.0)
    losses = [relative(b.best_loss, a.best_loss) for a, b in zip(one.state.stages, other.state.stages, strict=True)]
    findings.add(
        not different,
        tensors=len(names),
        different=len(different),
        first_different=next(iter(different), ""),
        largest_difference=float(f"{off:.1e}"),
        held_out_losses_off=float(f"{max(losses):.1e}"),
    )


def left_behind(bench: Bench, findings: Findings) -> None:
    """What is on the device behind a run that was not there before; and behind a second one."""
    bench.short_runs(findings, 2)
    settled = bench.left[0]["beside"]
    for number, seen in enumerate(bench.left, start=1):
        findings.add(
            seen["allocated"] <= seen["allocated_before"]
            and seen["reserved"] <= seen["reserved_before"]
            and seen["beside"] <= settled + LOADED_LATER,
            run=number,
            **{f"{name}_bytes": value for name, value in seen.items()},
        )


def busy(bench: Bench, findings: Findings, large: bool) -> None:
    """Of a step: kernels, copies and waits, the time of kernels and that of the clock. With reading and everything.

    At the end of an epoch, of which those here are short, the host waits once more.
    """
    _, _, traces = bench.traced(findings, large)
    for stage, seen in enumerate((trace.steps for trace in traces), start=1):
        steps = seen.steps
        figures = {"stage": stage, "steps": steps, "step_ms": round(1e3 * seen.seconds / steps, 2)}
        if not seen.kernels:
            findings.add(None, **figures)
            continue
        within = seen.kernels <= KERNELS * steps and seen.copies <= COPIES * steps
        findings.add(
            within and seen.waits <= math.ceil(WAITS * steps) + bench.size.traced[large][1] - 1,
            **figures,
            kernel_ms=round(1e3 * seen.busy / steps, 2),
            busy=round(seen.busy / seen.seconds, 3),
            kernels=round(seen.kernels / steps, 1),
            copies=round(seen.copies / steps, 1),
            waits=round(seen.waits / steps, 2),
        )
    if not all(trace.steps.kernels for trace in traces):
        raise NotMeasured("the profiler saw no kernels: it needs a real card, and a driver that lets it look")


def caching(bench: Bench, findings: Findings) -> None:
    """How fast stages were cached, and how far the last cache is from what the encoder gives on the CPU."""
    result, data, traces = bench.traced(findings, large=False)
    for stage, trace in enumerate(traces, start=1):
        findings.add(
            None,
            stage=stage,
            cache_mb=mega(trace.cache_bytes),
            seconds=round(trace.seconds, 2),
            mb_per_second=round(trace.cache_bytes / 1e6 / trace.seconds, 1),
            samples_per_second=round(trace.samples / trace.seconds, 1),
        )
    frames = data.read(0, 0, int(data.lengths[0]))
    with ActivationCache(result.paths.cache(len(traces))) as cached, torch.no_grad():
        kept = cached.read(0, 0, int(cached.lengths[0])).double()
    module = load(result.paths.out)
    with torch.no_grad():
        expected = module(frames[None] * module.entry.level)[0].double()
    off = float((kept - expected).norm() / expected.norm())
    findings.add(off <= FEATURES_AGREE, stage=len(traces), features_off=float(f"{off:.1e}"))


ROWS = {
    "plain": "end to end, plain PyTorch",
    "micro-batches of 1 (GradCache)": "micro-batches of 1 (GradCache)",
    "layer-to-layer streaming": "layer streaming",
    "the same, gradients of inputs before those of weights": "layer streaming, smallest",
}
"""Names in the table of alternatives.py, and here, where some rows are left out."""


def others(bench: Bench, findings: Findings) -> None:
    """Layerwise against end to end and against streaming, in full float32, so that one sees whether they train the same."""
    batch = bench.size.batches[0]
    config, data = paper("speech", batch, **bench.size.changes)
    network = build_network(config.net, (1,))
    stages = Stages(1), Stages(1, "smallest")
    workload = Workload(config, data, network, inputs_first=True, stages=stages)
    rows = [row for row in alternatives.rows_of(workload) if row.name in ROWS or not row.end_to_end]
    findings.raise_if_over()
    with exact_float32():
        # What cuBLAS takes once for all is no row's.
        matrix = torch.ones(8, 8, device=bench.device, requires_grad=True)
        (matrix @ matrix).sum().backward()
        matrix.grad = None
        steps = alternatives.measured(workload, rows, bench.device, bench.size.rounds)
    peaks = dict(zip([row.name for row in rows], [step.peak for step in steps], strict=True))
    plain, streamed = peaks["plain"], min(peaks[name] for name in ROWS if name != "plain")
    for row, step in zip(rows, steps, strict=True):
        findings.raise_if_over()
        counted = alternatives.rehearsed(workload, row)
        limit = streamed if "smallest" in row.name else plain
        findings.add(
            None if row.end_to_end else step.peak < limit,
            training=ROWS.get(row.name, row.name),
            peak_mb=mega(step.peak),
            predicted_mb=mega(counted.peak),
            gflop=round(counted.flops / 1e9, 1),
            moved_mb=mega(counted.moved),
            step_seconds=round(step.seconds, 4),
            weights_off=None if step.off is None else float(f"{step.off:.1e}"),
        )


def mega(count: int) -> float:
    """Bytes as MB."""
    return round(count / 1e6, 2)


_KEPT = "tensors request no more than predicted, and the driver shows no more than the budget"
_SAME_WEIGHTS = f"every layout trains the weights of the whole batch to {CLOSE}"
_FEW_CALLS = f"at most {KERNELS} kernels, {COPIES} copies and {WAITS} waits a step"


CHECKS = (
    Check("card", "the device computes", 10, card),
    Check("memory 1GB", f"--gpu-mem 1GB: {_KEPT}", 90, partial(memory, budget="1GB", large=True)),
    Check("memory smallest", f"the smallest --gpu-mem: {_KEPT}", 120, partial(memory, budget="smallest", large=False)),
    Check("memory 2GB", f"--gpu-mem 2GB: {_KEPT}", 80, partial(memory, budget="2GB", large=True)),
    Check("layouts", f"{_SAME_WEIGHTS}, at the precision of a run", 20, layouts),
    Check("layouts, exact", f"{_SAME_WEIGHTS}, without TF32", 20, layouts_exactly),
    Check(
        "against the CPU",
        f"losses are those of the CPU to {LOSSES_AGREE}, without TF32 the first to {CLOSE}",
        15,
        against_cpu,
    ),
    Check("same bits twice", "the same run twice in a process gives the same bits", 30, same_twice),
    Check("resume", "a run that was stopped goes on to the same bits", 20, resumed),
    Check("left behind", "a run leaves nothing on the device, and neither does a second one", 5, left_behind),
    Check("busy, small batch", _FEW_CALLS, 30, partial(busy, large=False)),
    Check("caching", "caches hold what the encoder gives on the CPU", 5, caching),
    Check("alternatives", "a stage takes less memory than end to end, at its smallest less than streaming", 60, others),
    Check("busy, large batch", _FEW_CALLS, 30, partial(busy, large=True)),
)
"""In the order of importance."""

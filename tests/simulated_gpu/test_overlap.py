"""A GPU computes while batches and outputs are copied, or has its input there: the same bits, within the budget."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_cases import NO_RECURRENCE, PATCHES, SPEECH, Case, Task, opened, outcome, run_case
from simulated_gpu import GPU, Counts, SimulatedGPU
from torch_cuda import installed

from layerwise.config import with_options
from layerwise.data.batches import group_renderings
from layerwise.engines import plan as planning
from layerwise.engines import run as engine
from layerwise.errors import Interrupted, TrainingError
from layerwise.events import CachingProgress, Event, StepDone
from layerwise.memory.copy_stream import CopyStream, Leaving
from layerwise.memory.driver import beside_tensors, segments_of
from layerwise.memory.meter import meter_for
from layerwise.memory.plan import ROOMS_OF_GPU, MemoryPlan
from layerwise.memory.reserved import Allocations, Segments
from layerwise.stop import StopFlag
from layerwise.training import task
from layerwise.training.budget import fit_stage
from layerwise.training.context import RunContext
from layerwise.training.forward import InferenceStage, OutputFormat
from layerwise.training.inference_peak import caching_peak
from layerwise.training.loader import SourceLoader
from layerwise.training.overlapped import overlapped_rows
from layerwise.training.trainer import StepRandomness
from layerwise.training.training_peak import training_peak

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from steps import natural_stages, paper

CASE = Case(SPEECH | NO_RECURRENCE | {"training.batch_size": 2, "training.max_epochs": 2})
NONE = {"ahead": False, "overlapped": False, "resident": 0}


@contextmanager
def only(*kept: str) -> Iterator[list[MemoryPlan]]:
    """Runs have of what is copied beside the steps these alone; gives the plans that they have."""
    fit, plans = engine.fit_to_budget, []

    def fitted(*args: Any) -> list[MemoryPlan]:
        for plan in fit(*args):
            allowed = replace(plan, ahead=True) if "ahead" in kept and plan.resident else plan
            plans.append(replace(allowed, **{name: off for name, off in NONE.items() if name not in kept}))
        return plans

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "fit_to_budget", fitted)
        yield plans


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Weights of a run with all of them."""
    with installed(SimulatedGPU()):
        return outcome(CASE, "cuda", tmp_path_factory.mktemp("undisturbed"))["weights"]


@pytest.mark.parametrize("network", ["sound", "crops of pictures"])
def test_each_of_them_gives_the_bits_of_a_run_without(gpu: SimulatedGPU, tmp_path: Path, network: str) -> None:
    case = CASE if network == "sound" else Case(PATCHES | {"data.picture": 24})
    found = {}
    for kept in ([], ["ahead"], ["overlapped"], ["resident"]):
        with only(*kept) as plans:
            found[str(kept)] = outcome(case, "cuda", tmp_path / "-".join(["run", *kept]))
        assert all(any(getattr(plan, name) for plan in plans) for name in kept)
    assert all(each == found["[]"] for each in found.values())


def test_a_step_is_computed_while_the_next_batch_comes(gpu: SimulatedGPU) -> None:
    made = Task.of(CASE, 1)
    trainer = made.trainer(MemoryPlan(2, 2, loss_room=ROOMS_OF_GPU[0], ahead=True), GPU)
    drawn = [StepRandomness(partial(np.random.default_rng, number)) for number in range(3)]
    batches = [trainer.prepared(made.batch(), each) for each in drawn]
    trainer.send_for(batches[0])
    trainer.train(batches[0], drawn[0])
    computing, copying = gpu.streams.made
    queued = computing.known[computing.number]
    trainer.send_for(batches[1])
    gpu.counts = Counts()
    trainer.send_for(batches[2])
    trainer.train(batches[1], drawn[1])
    assert gpu.counts.to_device == 1
    assert gpu.counts.waits == 0
    assert copying.known[computing.number] == queued  # nothing of the step behind it
    assert computing.known[copying.number] == copying.known[copying.number] - 1  # all copies but the last
    trainer.forget_coming()


@pytest.mark.parametrize("at", [StepDone, CachingProgress])
def test_a_run_that_is_stopped_meanwhile_goes_on_to_the_same_bits(
    gpu: SimulatedGPU, tmp_path: Path, at: type[Event], undisturbed: dict[str, bytes]
) -> None:
    stop, seen = StopFlag(), []

    def ask(event: Event) -> None:
        seen.append(isinstance(event, at))
        if sum(seen) == 2:
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run_case(CASE, "cuda", tmp_path, ask, stop)
    gpu.raise_faults()
    assert outcome(CASE, "cuda", tmp_path)["weights"] == undisturbed


def test_where_there_is_no_room_for_them_after_all_a_run_goes_on_without(
    gpu: SimulatedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    refused = []

    def without_room(work: Any) -> Any:
        def refusing(*args: Any) -> Any:
            refused.append(work.__name__)
            gpu.allocator.refuse = lambda allocation: True
            try:
                return work(*args)
            finally:
                gpu.allocator.refuse = lambda allocation: False

        return refusing

    monkeypatch.setattr(CopyStream, "bring", without_room(CopyStream.bring))
    monkeypatch.setattr(task, "resident_rows", without_room(task.resident_rows))
    found = outcome(CASE, "cuda", tmp_path)["weights"]
    assert set(refused) == {"bring", "resident_rows"}
    assert found == undisturbed


def test_with_its_input_there_a_stage_copies_but_what_is_drawn(gpu: SimulatedGPU, tmp_path: Path) -> None:
    counts: dict[tuple[bool, int], list[int]] = {}

    def note(resident: bool, event: Event) -> None:
        if isinstance(event, StepDone):
            counts.setdefault((resident, event.stage), []).append(gpu.counts.bytes_to_device)

    for resident in (False, True):
        with only(*["resident"] * resident) as plans:
            folder = tmp_path / str(resident)
            state = run_case(CASE, "cuda", folder, partial(note, resident), **{"net.width": 64}).state
        assert [bool(plan.resident) for plan in plans] == [False, resident]
        assert [record.input_on_device for record in state.stages] == [None, True if resident else None]
    copied = {key: each[-1] - each[0] for key, each in counts.items()}
    assert copied[True, 2] < copied[False, 2] / 2


def test_a_plan_says_whose_input_stays_on_the_device(gpu: SimulatedGPU) -> None:
    config, data, _ = opened(CASE, **{"training.device": "cuda"})
    stages = planning.plan(config, data=data).stages
    assert [(stage.input, stage.layout) for stage in stages] == [
        ("data", "whole batch"),
        ("device", "whole batch, input on the device"),
    ]


def test_a_piece_is_computed_while_the_one_before_leaves(
    gpu: SimulatedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, behind = Leaving.left, []

    def note(leaving: Leaving) -> tuple[torch.Tensor, ...]:
        behind.append(gpu.streams.default.known[0] - leaving._copied.known[0])
        return left(leaving)

    monkeypatch.setattr(Leaving, "left", note)
    with only("overlapped"):
        run_case(CASE, "cuda", tmp_path)
    assert sum(queued > 0 for queued in behind) == len(behind) - 2  # behind the last piece of a stage there is none


def test_an_output_that_the_cache_cannot_hold_is_refused_by_its_value(gpu: SimulatedGPU, tmp_path: Path) -> None:
    made = Task.of(CASE, 1)
    *_, stage, loader = caching(made)
    for parameter in stage.module.parameters():
        parameter.data.mul_(1e9)
    with pytest.raises(TrainingError, match=r"An output of stage 1 of \d\.\d+e\+\d+ does not fit into float16"):
        list(overlapped_rows(stage, loader, group_renderings(loader.lengths, 100), context()))


def context() -> RunContext:
    return RunContext(GPU, meter_for(GPU, None))


def caching(made: Task) -> tuple[Any, ...]:
    """A stage that is to be cached, and what it reads."""
    module = made.spec.build_module(0, GPU).eval()
    data = np.random.default_rng(0).standard_normal((3, 100_000, 1), dtype=np.float32)
    stage = InferenceStage(1, module, OutputFormat.of(made.config), resident=True)

    class Noise:
        lengths, columns, views = np.full(len(data), data.shape[1]), 1, 1

        def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
            return torch.from_numpy(data[sample, start:stop])

    return stage, SourceLoader(Noise(), device=GPU)


def test_reserved_bytes_of_the_caching_pass_are_predicted_and_hold() -> None:
    case = Case(
        SPEECH | {"net.width": 512, "net.context": 0, "net.kernels": [10], "net.strides": [5], "net.paddings": [2]}
    )
    piece = 60_000

    def cache(gpu: SimulatedGPU) -> None:
        made = Task.of(case, 1)
        stage, loader = caching(made)
        if gpu.allocator.log is not None:
            gpu.allocator.log.begin_step()
        with context().meter:
            rows = overlapped_rows(stage, loader, group_renderings(loader.lengths, piece), context())
            assert sum(len(each) for each in rows) == 3 * 19_999

    with installed(SimulatedGPU()) as gpu:
        made, segments = Task.of(case, 1), Segments(expandable=False)
        spec = replace(made.spec, lengths=caching(made)[1].lengths)
        predicted = caching_peak(made.config, spec, piece, segments, overlapped=True)
        log = gpu.allocator.log = Allocations()
        cache(gpu)
        gpu.allocator.log = None
        assert log.fewest(segments) <= predicted <= 1.08 * log.fewest(segments)
    with installed(SimulatedGPU()) as gpu:
        gpu.allocator.allowed = predicted
        cache(gpu)
        assert gpu.allocator.figures.num_ooms == 0


def test_the_plan_has_them_where_the_budget_has_room(gpu: SimulatedGPU) -> None:
    config, data = paper("speech", 8, **{"training.device": "cuda", "memory.flops_per_byte": 4096})
    spec = natural_stages(config, data)[1]
    rows, segments = 100_000, segments_of(GPU, expandable=False)
    whole = MemoryPlan(8, 8, loss_room=ROOMS_OF_GPU[0])
    kinds = {"": whole, "ahead": replace(whole, ahead=True), "resident": replace(whole, resident=rows)}
    needed = {name: training_peak(config, spec, plan, segments).bytes for name, plan in kinds.items()}
    assert needed[""] < needed["ahead"] < needed["resident"]

    def fitted(device: torch.device, room: int | None, rows: int) -> MemoryPlan:
        limit = {} if room is None else {"memory.gpu_mem": f"{room + beside_tensors(GPU)}B"}
        plan = fit_stage(with_options(config, limit), spec, device, (), rows)
        assert plan is not None
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
        for name, room in needed.items():
            plan = fitted(GPU, room, rows)
            assert plan.at_once
            assert (plan.ahead, bool(plan.resident)) == (name == "ahead", name == "resident")
            assert plan.overlapped
        assert fitted(GPU, None, rows).resident == rows
        assert not fitted(GPU, None, 10**10).resident  # more than the card has
        assert fitted(GPU, None, 10**10).ahead
    on_cpu = fitted(torch.device("cpu"), math.ceil(1e9), rows)
    assert (on_cpu.ahead, on_cpu.overlapped, on_cpu.resident) == (False, False, 0)

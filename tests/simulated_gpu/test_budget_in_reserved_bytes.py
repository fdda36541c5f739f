"""What a plan says of a GPU is what its allocator reserves, and a budget of that much holds."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_cases import CASES, opened, run_case
from simulated_gpu import GPU, SimulatedGPU

from layerwise.config import with_options
from layerwise.engines import run as engine
from layerwise.engines.plan import plan
from layerwise.events import Event, StepDone
from layerwise.memory.caching_allocator import BEYOND_CAP
from layerwise.memory.driver import MARGIN, beside_tensors, possible_segments
from layerwise.memory.plan import NARROW_ROOM, MemoryPlan
from layerwise.training.budget import fit_stage
from layerwise.training.training_peak import training_peak

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import reserved
from steps import natural_stages, paper

WHOLE = MemoryPlan(4, 4)


@pytest.mark.parametrize(
    ("stage", "memory_plan"),
    [(1, WHOLE), (3, replace(WHOLE, micro_batch=1, loss_room=NARROW_ROOM)), (6, WHOLE)],
)
def test_reserved_bytes_are_predicted_and_a_budget_of_so_many_holds(stage: int, memory_plan: MemoryPlan) -> None:
    config, data = paper("speech", 4, **{"data.window": 5_120})
    spec = natural_stages(config, data)[stage - 1]
    found = reserved.measured(reserved.Case("speech", stage, config, spec, memory_plan))
    assert found.requested < found.modelled <= found.predicted <= 1.08 * found.modelled
    assert found.holds


def test_the_smallest_budget_that_a_plan_names_holds_for_a_run(gpu: SimulatedGPU, tmp_path: Path) -> None:
    config, data, _ = opened(CASES["patches"], **{"training.device": "cuda"})
    smallest = plan(config, data=data).smallest_budget_bytes
    gpu.allocator.most_reserved = 0
    state = run_case(CASES["patches"], "cuda", tmp_path, **{"memory.gpu_mem": f"{smallest}B"}).state
    assert gpu.allocator.figures.num_ooms == 0
    assert gpu.context + gpu.allocator.most_reserved <= smallest
    assert all(gpu.context < (record.driver_bytes or 0) <= smallest for record in state.stages)


def test_segments_are_expandable_for_a_stage_whose_plan_says_so(
    gpu: SimulatedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, budget = engine.fit_to_budget, 600 * 10**6

    def second_alone(*args: Any) -> list[MemoryPlan]:
        return [replace(plan, expandable=number == 1) for number, plan in enumerate(fit(*args))]

    monkeypatch.setattr(engine, "fit_to_budget", second_alone)

    def note(event: Event) -> None:
        if isinstance(event, StepDone):
            assert gpu.allocator.expandable == (event.stage == 2)
            assert gpu.allocator.allowed == budget - gpu.context - MARGIN - BEYOND_CAP * (event.stage == 2)

    run_case(CASES["patches"], "cuda", tmp_path, note, **{"memory.gpu_mem": f"{budget}B"})
    assert not gpu.allocator.expandable


def test_a_plan_takes_expandable_segments_where_fixed_ones_take_more(gpu: SimulatedGPU) -> None:
    """As of a stage whose tensors are all of more than half a segment."""
    config, data = paper("speech", 16, **{"memory.gpu_mem": "850MB", "training.device": "cuda"})
    spec = natural_stages(config, data)[0]
    fixed, expandable = possible_segments(GPU)
    whole = MemoryPlan(16, 16)
    assert training_peak(config, spec, whole, expandable).bytes < training_peak(config, spec, whole, fixed).bytes
    least = training_peak(config, spec, whole, expandable).bytes
    config = with_options(config, {"memory.gpu_mem": f"{least + beside_tensors(GPU)}B", "memory.flops_per_byte": 64})
    found = fit_stage(config, spec, GPU)
    assert found is not None
    assert found.whole
    assert found.expandable
    assert "segments of a fixed size would take" in found.why

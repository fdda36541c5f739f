"""What a plan says of a GPU is what its allocator reserves, and a budget of that much holds."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_cases import CASES, opened, run_case
from simulated_gpu import SimulatedGPU

from layerwise.engines.plan import plan
from layerwise.memory.plan import NARROW_ROOM, MemoryPlan

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

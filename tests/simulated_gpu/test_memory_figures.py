"""What a record says of memory is what the device had at its fullest."""

from pathlib import Path

import pytest
import torch
from gpu_cases import CASES, run_case
from simulated_gpu import GPU, SimulatedGPU
from torch_cuda import installed

from layerwise.events import Event, StageDone, StageStarted
from layerwise.memory.driver import MARGIN, workspace_bytes


def test_a_record_of_a_gpu_says_what_the_device_had(gpu: SimulatedGPU, tmp_path: Path) -> None:
    """Weights of a recurrent layer lie side by side in one storage there; the driver's figure is that of the fullest moment."""
    reserved = []

    def watch(event: Event) -> None:
        if isinstance(event, StageStarted):
            gpu.allocator.most_reserved = 0
        if isinstance(event, StageDone):
            reserved.append(gpu.allocator.most_reserved)

    of_device = run_case(CASES["speech"], "cuda", tmp_path / "cuda", watch).state.stages
    assert [record.allocator_bytes for record in of_device] == reserved
    assert [record.driver_bytes for record in of_device] == [gpu.context + each for each in reserved]
    of_host = run_case(CASES["speech"], "cpu", tmp_path / "cpu").state.stages
    for kind in ("parameters", "optimizer"):
        held, expected = ([record.train_peak_by_kind[kind] for record in records] for records in (of_device, of_host))
        assert held == expected


def test_what_the_driver_shows_stays_under_the_budget(gpu: SimulatedGPU, tmp_path: Path) -> None:
    budget = 600 * 10**6
    state = run_case(CASES["patches"], "cuda", tmp_path, **{"memory.gpu_mem": "600MB"}).state
    assert gpu.allocator.allowed == budget - gpu.context - MARGIN
    assert gpu.allocator.figures.num_ooms == 0
    assert all(gpu.context < (record.driver_bytes or 0) <= budget for record in state.stages)
    assert gpu.allocator.most_reserved <= budget - gpu.context


@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (9, 0), (12, 0)])
def test_a_plan_leaves_room_for_what_torch_gives_cublas_on_that_card(capability: tuple[int, int]) -> None:
    with installed(SimulatedGPU(capability=capability)):
        matrix = torch.ones(4, 4, device=GPU, requires_grad=True)
        before = torch.cuda.memory_allocated()
        (matrix @ matrix).sum().backward()
        matrix.grad = None
        assert 0 < torch.cuda.memory_allocated() - before <= workspace_bytes(GPU)

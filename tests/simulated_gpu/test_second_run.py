"""A process may use the device before a run and beside it, and start another one after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import CASES, outcome, run_case
from simulated_gpu import CUBLAS_WORKSPACE, SimulatedGPU

from layerwise.errors import BudgetError, Interrupted
from layerwise.events import Event, StepDone
from layerwise.stop import StopFlag

CASE = CASES["hinge, float16, noise"]
TIED = CASES["simultaneous, own network, hinge"]
"""Batch normalisation ties its batches together, so that a step cannot be taken in smaller slices."""


@pytest.fixture
def expected(gpu: SimulatedGPU, tmp_path: Path) -> dict[str, Any]:
    """What the first run of the process comes to."""
    return outcome(CASE, "cuda", tmp_path / "first")


def test_tensors_of_the_user_stay(gpu: SimulatedGPU, expected: dict[str, Any], tmp_path: Path) -> None:
    kept = torch.ones(1000, device="cuda")
    assert outcome(CASE, "cuda", tmp_path / "second") == expected
    assert torch.cuda.memory_allocated() == 4096
    assert kept.sum().item() == 1000


def test_workspaces_of_cublas_from_before_go_unnoticed(
    gpu: SimulatedGPU, expected: dict[str, Any], tmp_path: Path
) -> None:
    matrix = torch.ones(4, 4, device="cuda")
    matrix @ matrix
    assert torch.cuda.memory_allocated() >= CUBLAS_WORKSPACE
    assert outcome(CASE, "cuda", tmp_path / "second") == expected


def test_what_a_run_has_left_that_ran_out_of_memory_goes_unnoticed(
    gpu: SimulatedGPU, expected: dict[str, Any], tmp_path: Path
) -> None:
    stop = gpu.allocator.allocations + 98
    gpu.allocator.refuse = lambda number: number >= stop
    with pytest.raises(BudgetError):
        outcome(TIED, "cuda", tmp_path / "failed")
    gpu.allocator.refuse = lambda number: False
    assert outcome(CASE, "cuda", tmp_path / "second") == expected
    assert gpu.live == 0


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    gpu: SimulatedGPU, expected: dict[str, Any], tmp_path: Path
) -> None:
    stop = StopFlag()

    def stop_in_the_second_stage(event: Event) -> None:
        if isinstance(event, StepDone) and event.stage == 2:
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run_case(CASE, "cuda", tmp_path / "second", stop_in_the_second_stage, stop)
    assert outcome(CASE, "cuda", tmp_path / "second")["weights"] == expected["weights"]
    assert gpu.live == 0

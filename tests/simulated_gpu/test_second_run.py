"""A process may use the device before a run and beside it, and start another one after it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_cases import CASES, outcome
from simulated_gpu import CUBLAS_WORKSPACE, SimulatedGPU

from layerwise.errors import BudgetError

CASE = CASES["hinge, float16, noise"]
TIED = CASES["simultaneous, own network, hinge"]
"""Batch normalisation ties its batches together, so that a step cannot be taken in smaller slices."""


def multiply(gpu: SimulatedGPU, folder: Path) -> None:
    """Leaves a workspace of cuBLAS behind."""
    matrix = torch.ones(4, 4, device="cuda")
    matrix @ matrix
    assert torch.cuda.memory_allocated() >= CUBLAS_WORKSPACE


def keep(gpu: SimulatedGPU, folder: Path) -> torch.Tensor:
    return torch.ones(1000, device="cuda")


def run_out_of_memory(gpu: SimulatedGPU, folder: Path) -> None:
    """Leaves what the error still held."""
    stop = gpu.allocator.allocations + 98
    gpu.allocator.refuse = lambda number: number == stop
    with pytest.raises(BudgetError):
        outcome(TIED, "cuda", folder / "failed")


@pytest.mark.parametrize("between", [multiply, keep, run_out_of_memory])
def test_a_second_run_of_a_process_ends_as_the_first(
    gpu: SimulatedGPU, between: Callable[[SimulatedGPU, Path], object], tmp_path: Path
) -> None:
    first = outcome(CASE, "cuda", tmp_path / "first")
    kept = between(gpu, tmp_path)
    before = 0 if kept is None else torch.cuda.memory_allocated()
    assert outcome(CASE, "cuda", tmp_path / "second") == first
    assert torch.cuda.memory_allocated() == before

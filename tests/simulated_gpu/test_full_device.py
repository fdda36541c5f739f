"""Where an allocation fails once, the step is repeated in smaller slices or the run is refused and goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_cases import CASES, NO_RECURRENCE, SPEECH, Case, Task, run_case
from safetensors.numpy import load_file
from simulated_gpu import GPU, SimulatedGPU
from torch_cuda import installed

from layerwise.errors import BudgetError
from layerwise.memory.plan import MemoryPlan
from layerwise.training.optimizer import LossScale, Optimization, Optimizer
from layerwise.training.trainer import NoSmallerSlices

LAYOUTS = {
    "whole batch": {},
    "micro-batches": {"micro_batch": 2},
    "recomputed": {"micro_batch": 2, "recompute": True},
    "optimizer on the host": {"micro_batch": 2, "optimizer_on_host": True, "gradients_wait": True},
    "streamed": {"micro_batch": 2, "optimizer_on_host": True, "predictors": 1, "parts": 1, "gradients_at_once": True},
}
SAMPLED = 6
"""Allocations of each that fail."""


@cache
def task() -> Task:
    return Task.of(Case(SPEECH | NO_RECURRENCE, cut=(2,)), 1)


def plan(name: str) -> MemoryPlan:
    return MemoryPlan(**{"batch_size": 4, "micro_batch": 4, **LAYOUTS[name]})


@contextmanager
def failing(number: int) -> Iterator[SimulatedGPU]:
    """A device whose allocation of this number fails, and no other."""
    with installed(SimulatedGPU()) as gpu:
        gpu.allocator.refuse = lambda allocation: allocation == number
        yield gpu


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_survives_an_allocation_that_fails(name: str) -> None:
    made, layout = task(), plan(name)
    with failing(0) as gpu:
        made.trainer(layout, GPU)
        first = gpu.allocator.allocations + 1
    with failing(0) as gpu:
        expected = made.steps(layout, GPU)
        last = gpu.allocator.allocations
    for number in np.linspace(first, last, SAMPLED, dtype=int).tolist():
        with failing(number) as gpu:
            found = made.steps(layout, GPU)
            assert gpu.allocator.figures.num_ooms == 1
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
        assert weights(found) == pytest.approx(weights(expected), rel=1e-4, abs=1e-5)


def test_scaled_gradients_survive_an_allocation_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of all gradients is the first thing behind the slices, which could be made smaller."""
    made, begun, unscale = Task.of(CASES["hinge, float16, noise"], 1), [], LossScale.unscale
    monkeypatch.setattr(
        LossScale, "unscale", lambda *args: [begun.append(gpu.allocator.allocations), unscale(*args)][1]
    )
    with failing(0) as gpu:
        expected = made.steps(made.plans[0], GPU)
    with failing(begun[0] + 1) as gpu:
        assert made.steps(made.plans[0], GPU) == expected
        assert gpu.allocator.figures.num_ooms == 1


def test_an_optimizer_that_runs_out_of_memory_within_a_step_is_not_asked_again() -> None:
    made = Task.of(Case(SPEECH | NO_RECURRENCE, cut=(2,)), 1)
    sgd = Optimization.of(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), None, 1)
    spec, begun = replace(made.spec, optimization=sgd), []
    with failing(0) as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", _noting(Optimizer.step, begun, gpu))
        Task(made.config, spec).steps(made.plans[0], GPU)
    with failing(begun[1] + 1) as gpu, pytest.raises(NoSmallerSlices, match=r"set memory\.optimizer to host"):
        Task(made.config, spec).steps(made.plans[0], GPU)


def _noting(step: Callable[[Optimizer], None], begun: list[int], gpu: SimulatedGPU) -> Callable[[Optimizer], None]:
    def noted(optimizer: Optimizer) -> None:
        begun.append(gpu.allocator.allocations)
        step(optimizer)

    return noted


def weights(steps: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.frombuffer(values, dtype=np.float32) for values in steps["weights"].values()])


RUN = CASES["patches"]


def test_a_run_whose_allocation_fails_ends_as_the_others_or_names_the_stage_and_goes_on_then(tmp_path: Path) -> None:
    def encoder(folder: Path) -> dict[str, np.ndarray]:
        return load_file(run_case(RUN, "cuda", folder).paths.encoder)

    with failing(0) as gpu:
        expected = encoder(tmp_path / "undisturbed")
        last = gpu.allocator.allocations
    refused = 0
    for number in np.linspace(1, last, 4, dtype=int).tolist():
        with failing(number):
            try:
                found = encoder(tmp_path / str(number))
            except BudgetError as error:
                refused += 1
                assert str(error).startswith("Stage ")
                found = encoder(tmp_path / str(number))
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4)
    assert refused < 4

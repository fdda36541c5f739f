"""Steps of every layout come out on the simulated GPU as on the CPU, to the bit."""

import gc
from functools import cache

import pytest
import torch
from gpu_cases import ANY_LAYOUT, CPU, NO_RECURRENCE, PATCHES, SPEECH, WHOLE, Case, Task, convolutions
from simulated_gpu import GPU, SimulatedGPU
from torch import nn

from layerwise.config import OWN
from layerwise.memory.plan import MemoryPlan

STAGES = {
    "convolution": (Case(SPEECH | NO_RECURRENCE), 2),
    "convolutions": (Case(SPEECH | NO_RECURRENCE, cut=(2,)), 1),
    "GRU": (Case(SPEECH), 3),
    "picture blocks": (Case(PATCHES, cut=(2,)), 1),
    "batch norm and dropout": (Case(PATCHES | {"net.name": OWN}, convolutions, (5,)), 1),
}
"""Name to its case and its number."""
OBJECTIVES = {"infonce": {}, "hinge": {}, "ntxent": {"data.views": 2}, "supervised": {"objective.label": "label"}}
SAMPLED = 3
"""Layouts of each, others for each objective; there are some hundred."""


@cache
def task(name: str, objective: str) -> Task:
    case, stage = STAGES[name]
    return Task.of(case, stage, **ANY_LAYOUT, **{"objective.name": objective, **OBJECTIVES[objective]})


class Remembering(nn.Module):
    """Two recurrent layers, each with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.LSTM(8, 8, 2, batch_first=True, dropout=0.5) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.mean(1))[0])[0].mean(1)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_pass_drops_out_what_the_first_one_did(gpu: SimulatedGPU, recompute: bool) -> None:
    made = Task.of(Case(WHOLE, Remembering), 1, **ANY_LAYOUT, **{"training.stages": 1})
    assert len(made.spec.layers) > 1
    plan = MemoryPlan(batch_size=4, micro_batch=2, recompute=recompute)
    assert made.steps(plan, GPU) == made.steps(plan, CPU)
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", STAGES)
def test_a_step_comes_out_the_same_in_every_layout(gpu: SimulatedGPU, name: str, objective: str) -> None:
    made = task(name, objective)
    plans, first = made.plans, list(OBJECTIVES).index(objective)
    for plan in plans[first % len(plans) :: len(plans) // SAMPLED + 1]:
        expected = made.steps(plan, CPU)
        gpu.counts.kernels = 0
        assert made.steps(plan, GPU) == expected, str(plan)
        assert gpu.counts.kernels > 0
    gc.collect()  # what torch.fx makes are cycles
    assert gpu.live == 0

"""The learning rate of Adam: it rises and falls if asked to, and is the same behind a resume; and its weight decay."""

import math

import pytest
import torch
from torch import nn

from layerwise.training.optimizer import Optimization, Optimizer, adam


def steps(
    warmup: int, first: int, last: int, values: torch.Tensor, state: dict | None = None, **options: object
) -> Optimizer:
    """Steps first to last, each with a gradient of its own, on from a state."""
    parameter = nn.Parameter(values)
    optimizer = Optimizer({"p": parameter}, adam(0.5, 1e-6, warmup, **options))
    if state:
        optimizer.load(state)
    for number in range(first, last):
        optimizer.begin_step(number, 8)
        parameter.grad = torch.tensor([1.0, -2.0]) * (number + 1)
        optimizer.step()
    return optimizer


def test_the_learning_rate_rises_evenly_and_then_stays() -> None:
    moved = []
    for last in range(1, 7):
        values = torch.zeros(2)
        steps(4, last - 1, last, values)  # the first step of Adam is as long as its learning rate
        moved.append(values.abs().max().item())
    assert moved == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5], rel=1e-4)


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_resume_goes_on_at_the_learning_rate_of_its_step(stop: int) -> None:
    whole, resumed = torch.zeros(2), torch.zeros(2)
    steps(4, 0, 7, whole)
    first = steps(4, 0, stop, resumed)
    saved = {name: {key: value.clone() for key, value in state.items()} for name, state in first.state().items()}
    steps(4, stop, 7, resumed, saved)
    assert torch.equal(whole, resumed)


def test_along_a_cosine_the_learning_rate_falls_to_nothing() -> None:
    moved = []
    for last in (1, 5, 8, 9):
        values = torch.zeros(2)
        steps(0, last - 1, last, values, cosine=True)
        moved.append(values.abs().max().item())
    assert moved == pytest.approx([0.5, 0.25, 0.5 * (1 - math.cos(math.pi / 8)) / 2, 0], rel=1e-4, abs=1e-6)


def test_weight_decay_takes_a_part_of_the_weights_whatever_the_gradient() -> None:
    plain, decayed = torch.full((2,), 4.0), torch.full((2,), 4.0)
    steps(0, 0, 1, plain)
    steps(0, 0, 1, decayed, weight_decay=0.1)
    assert (plain - decayed).tolist() == pytest.approx([0.5 * 0.1 * 4] * 2)


def test_the_state_of_an_earlier_adam_goes_on_with_the_same_bits() -> None:
    """Checkpoints of before weight decay hold the groups of torch.optim.Adam."""

    def of_adam(lr: float, eps: float, *_: object) -> Optimization:
        return Optimization(lambda parameters: torch.optim.Adam(parameters, lr=lr, eps=eps, fused=True))

    whole, resumed = torch.zeros(2), torch.zeros(2)
    steps(0, 0, 5, whole)
    parameter = torch.nn.Parameter(resumed)
    before = Optimizer({"p": parameter}, of_adam(0.5, 1e-6))
    for number in range(3):
        parameter.grad = torch.tensor([1.0, -2.0]) * (number + 1)
        before.step()
    steps(0, 3, 5, resumed, {name: {k: v.clone() for k, v in state.items()} for name, state in before.state().items()})
    assert torch.equal(whole, resumed)

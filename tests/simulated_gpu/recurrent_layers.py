"""Recurrent layers of the simulated GPU: one kernel each, as cuDNN's, with their weights side by side.

What they keep for the backward pass is what the layers of the CPU keep. Not modelled: cuDNN's reserve, its state of dropout,
and how it rounds.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_gpu import MixedDevices, SimulatedGPU


def use_recurrent_layers(gpu: SimulatedGPU, patch: pytest.MonkeyPatch) -> None:
    """Has torch compute them on this GPU."""
    for name in ("gru", "lstm", "rnn_tanh", "rnn_relu"):
        patch.setattr(torch._VF, name, _on(gpu, getattr(torch._VF, name)), raising=False)
    patch.setattr(torch, "_cudnn_rnn_flatten_weight", _side_by_side)


def _on(gpu: SimulatedGPU, compute: Callable[..., Any]) -> Callable[..., Any]:
    def computed(x: torch.Tensor, state: Any, weights: list[torch.Tensor], *how: Any) -> Any:
        states = state if isinstance(state, tuple) else (state,)
        given = (x, *states, *weights)
        if not all(isinstance(tensor, torch.Tensor) for tensor in given) or not any(map(gpu.holds, given)):
            return compute(x, state, weights, *how)
        if not all(map(gpu.holds, given)):
            raise MixedDevices("Input, hidden and parameter tensors are not at the same device")
        return _Layer.apply(gpu, compute, how, len(states), *given)

    return computed


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gpu: SimulatedGPU,
        compute: Callable[..., Any],
        how: tuple[Any, ...],
        states: int,
        *given: torch.Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        with gpu.as_one_kernel(), torch.set_grad_enabled(any(ctx.needs_input_grad)):
            inner = [
                tensor.detach().requires_grad_(need)
                for tensor, need in zip(given, ctx.needs_input_grad[4:], strict=True)
            ]
            x, state, weights = inner[0], tuple(inner[1 : 1 + states]), inner[1 + states :]
            results = compute(x, state if states > 1 else state[0], weights, *how)
        ctx.gpu, ctx.inner, ctx.results = gpu, inner, results
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        known = [
            (result, gradient) for result, gradient in zip(ctx.results, gradients, strict=True) if gradient is not None
        ]
        wanted = [tensor for tensor in ctx.inner if tensor.requires_grad]
        with ctx.gpu.as_one_kernel():
            found = iter(torch.autograd.grad([r for r, _ in known], wanted, [g for _, g in known], allow_unused=True))
        ctx.results = None
        return None, None, None, None, *[next(found) if tensor.requires_grad else None for tensor in ctx.inner]


def _side_by_side(weights: list[torch.Tensor], *how: object) -> torch.Tensor:
    """Puts weights into one storage, each at its place."""
    whole = torch.cat([weight.flatten() for weight in weights])
    start = 0
    for weight in weights:
        weight.set_(whole[start : start + weight.numel()].view_as(weight))
        start += weight.numel()
    return whole

"""Recurrent layers of the simulated GPU: one kernel each, as cuDNN's, with their weights side by side.

Between layers cuDNN drops out by a generator of its own, which is seeded from the device's when that has been seeded anew, and
whose state stays on the device for good (aten/src/ATen/native/cudnn/RNN.cpp, get_dropout_state).

What they keep for the backward pass is what the layers of the CPU keep. Not modelled: cuDNN's reserve, and how it rounds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from simulated_gpu import GPU, MixedDevices, SimulatedGPU
from torch.utils._pytree import tree_map


def use_recurrent_layers(gpu: SimulatedGPU, patch: pytest.MonkeyPatch) -> None:
    """Has torch compute them on this GPU."""
    dropout = _Dropout(gpu)
    for name in ("gru", "lstm", "rnn_tanh", "rnn_relu"):
        patch.setattr(torch._VF, name, _on(gpu, dropout, getattr(torch._VF, name)), raising=False)
    patch.setattr(torch, "_cudnn_rnn_flatten_weight", _side_by_side)


STATE_BYTES = 2 * 2**20 + 2**12
"""Of the generators of dropout; PyTorch says of it that it is slightly over 2 MB."""


class _Dropout:
    """cuDNN's."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        self._gpu, self._generator = gpu, torch.Generator()
        self._state: torch.Tensor | None = None

    def drawn(self, rate: float, train: bool) -> AbstractContextManager[None]:
        """Inside, a layer of this rate is computed."""
        if not train or not rate:
            return nullcontext()
        if self._state is None or self._gpu.generator.seeded:
            self._gpu.generator.seeded = False
            self._generator.manual_seed(int(torch.empty((), dtype=torch.int64, device=GPU).random_().item()))
            self._state = torch.empty(STATE_BYTES, dtype=torch.uint8, device=GPU)
        return self._gpu.drawing_from(self._generator)


def _on(gpu: SimulatedGPU, dropout: _Dropout, compute: Callable[..., Any]) -> Callable[..., Any]:
    def computed(x: torch.Tensor, state: Any, weights: list[torch.Tensor], *how: Any) -> Any:
        states = state if isinstance(state, tuple) else (state,)
        given = (x, *states, *weights)
        if not all(isinstance(tensor, torch.Tensor) for tensor in given) or not any(map(gpu.holds, given)):
            return compute(x, state, weights, *how)
        if not all(map(gpu.holds, given)):
            raise MixedDevices("Input, hidden and parameter tensors are not at the same device")
        if not torch.backends.cudnn.enabled:
            return compute(x, state, weights, *how)
        if torch.is_autocast_enabled("cuda"):  # float16, whatever the rest is cast to
            x, state, weights = tree_map(torch.Tensor.half, (x, state, weights))
            given = (x, *(state if isinstance(state, tuple) else (state,)), *weights)
        gpu.recurrent_in.add(x.dtype)
        _, _, rate, train, *_ = how
        with dropout.drawn(rate, train):
            if not torch.is_grad_enabled():  # for which the CPU has kernels of its own
                with gpu.as_one_kernel():
                    return compute(x, state, weights, *how)
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
        with gpu.as_one_kernel(), torch.enable_grad():
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

"""Rehearses recurrent layers in fewer and wider steps: every frame is a step, and takes its time without values too."""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

STEPS = 16
"""What lives during one step alone is counted as wide as the steps are; with so many of them that is less than a fiftieth
of a training step."""

_PER_FRAME = {"gru": 9, "lstm": 9, "rnn_tanh": 9, "rnn_relu": 9}
"""Functions of torch that take a step for every frame, with the number of their arguments; the fourth one is a bool where the
sequences are not packed."""


class FoldedFrames(TorchFunctionMode):
    """Inside, a recurrent layer takes T frames of B samples as T / k frames of B k samples, with T / k at least STEPS.

    What is kept of the frames has the same bytes, and the arithmetic is the same. The values are others, so tensors that have
    values are taken as they are; and so are packed sequences, and frames whose number has no fitting divisor.
    live_bytes: on the device now.
    """

    def __init__(self, live_bytes: Callable[[], int]) -> None:
        super().__init__()
        self._live_bytes = live_bytes

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if _PER_FRAME.get(name) != len(args) or kwargs or not isinstance(args[3], bool):
            return func(*args, **(kwargs or {}))
        frames, states, *others = args
        if not isinstance(frames, FakeTensor):
            return func(*args)
        batch, time = (0, 1) if args[-1] else (1, 0)
        length = frames.shape[time]
        folds = next(k for k in range(max(length // STEPS, 1), 0, -1) if length % k == 0)
        if folds == 1:
            return func(*args)
        before = self._live_bytes()
        outputs, *left = func(_Refolded.apply(frames, batch, time, folds, 0), _widened(states, folds), *others)
        kept = (self._live_bytes() - before) * torch.is_grad_enabled()
        # A backward pass frees what was kept of a step, and allocates then: it is to find no more free than behind one frame.
        outputs = _Refolded.apply(outputs, time, batch, folds, kept * (folds - 1) // length)
        return outputs, *(state[:, : frames.shape[batch]] for state in left)


def _widened(states: Any, folds: int) -> Any:
    """The first states, of an LSTM two."""
    if isinstance(states, torch.Tensor):
        return states.repeat(1, folds, 1)
    return tuple(state.repeat(1, folds, 1) for state in states)


class _Refolded(Function):
    """A view with one axis so many times as long, and another one as many times as short; its values are in any order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, longer: int, shorter: int, folds: int, kept: int) -> torch.Tensor:
        """kept: bytes that are held for as long as the graph is."""
        ctx.axes, ctx.kept = (shorter, longer, folds), torch.empty(kept, dtype=torch.uint8, device=x.device)
        return _refolded(x, longer, shorter, folds)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return _refolded(gradient, *ctx.axes), None, None, None, None


def _refolded(x: torch.Tensor, longer: int, shorter: int, folds: int) -> torch.Tensor:
    sizes = list(x.shape)
    sizes[longer], sizes[shorter] = sizes[longer] * folds, sizes[shorter] // folds
    # The axes stay in the order in which they lie in memory, so that what follows copies no more and no less.
    strides, step = [0] * len(sizes), 1
    for axis in sorted(range(len(sizes)), key=lambda axis: (x.stride(axis), -axis)):
        strides[axis], step = step, step * sizes[axis]
    return x.as_strided(sizes, strides)

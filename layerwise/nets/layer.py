"""A layer: the smallest piece that a network is cut into. It maps frames to frames, whole or streamed piece by piece.

Frames lie in front of their channels, (B, L, *frame), because that is how they are cached: a window is one contiguous read.
Samples of different lengths share a batch: `lengths` says how many frames of each are real, and every layer sets the
rest to zero, so that a padded sample gives exactly what it gives alone. Objectives and probes see one vector per frame.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn


class Layer(nn.Module):
    """Base of all layers. Sequence layers set the geometry below; layers that work inside a frame keep the defaults."""

    kernel = 1
    stride = 1
    padding = 0
    recurrent = False
    """Whether the output summarises all frames so far; its InfoNCE targets are then the layer's inputs (as in CPC)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, *frame) to (B, out_length(L), *output frame)."""
        raise TypeError(f"{type(self).__name__} defines no forward.")

    def first_weights_from(self, x: torch.Tensor, rng: np.random.Generator) -> None:
        """Sets what is to depend on the data before the training. x (B, L, *frame): inputs, on the host like the layer."""

    def arrange_for_gpu(self) -> None:
        """Puts the weights into the order in which a GPU's kernels read them: these would copy them at each call otherwise."""

    def valid(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs that a piece (B, n, *frame) of the input determines by itself: `forward` without the padding."""
        if self.padding or self.recurrent:
            raise TypeError(f"{type(self).__name__} defines no outputs of a piece.")
        return self(x)

    def before_activation(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` up to `activation`, which together are `forward`."""
        return self(x)

    def activation(self, y: torch.Tensor) -> torch.Tensor:
        """The non-linearity at the end, frame by frame, so that it can wait until it is known which frames are needed.

        y (..., *output frame); may overwrite it.
        """
        return y

    def out_length(self, length: Any) -> Any:
        """Frames that come out of `length` frames (an int or an int64 array)."""
        # Of no frame nothing comes, though the padding alone may be as long as the kernel.
        return np.maximum((length + 2 * self.padding - self.kernel) // self.stride + 1, 0) * (np.asarray(length) > 0)

    def push(self, x: torch.Tensor, state: Any, last: bool) -> tuple[torch.Tensor, Any]:
        """The next piece of a stream: (B, n, *frame) to the output frames that are complete by now, and the new state.

        The state of the first piece is None; `last` marks the final piece. All outputs together equal `forward` of all
        inputs together.
        """
        return self(x), None


def mask_padding(x: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
    """Sets the frames of x (B, L, *frame) from lengths[b] on to zero; x itself where there are none."""
    return mask_outside(x, np.zeros_like(lengths), lengths)


def mask_outside(x: torch.Tensor, firsts: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """x (B, n, *frame) holds frames firsts[b] on of samples of lengths[b] frames: sets those outside of these to zero."""
    if (firsts >= 0).all() and (firsts + x.shape[1] <= lengths).all():
        return x
    frames, start, stop = np.arange(x.shape[1]), -firsts[:, None], (lengths - firsts)[:, None]
    outside = torch.tensor((frames < start) | (frames >= stop), device=x.device)
    # Not masked_fill, which takes twice the time on a CPU.
    return torch.where(outside.reshape(*outside.shape, *[1] * (x.dim() - 2)), x.new_zeros(()), x)


def vectors(frames: torch.Tensor, cells: Sequence[int] = ()) -> torch.Tensor:
    """One vector per frame: (B, L, C, ...) to (B, L, C), the mean over what lies behind the channels.

    cells: so many along each axis behind the channels, with a vector each: (B, L, C, H, W) to (B, L * h * w, C).
    """
    if frames.dim() == 3:
        return frames
    if not cells:
        return frames.flatten(3).mean(3)
    # The cells of adaptive pooling may overlap, and its gradients on a GPU are other bits every time.
    for axis, count in enumerate(cells, start=3):
        frames = torch.stack([part.mean(axis) for part in frames.tensor_split(count, axis)], axis)
    return frames.flatten(3).transpose(2, 3).flatten(1, 2)


def take(frames: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The frames (R, C) at rows int64 [R] of (B, L, C), numbered b * L + t. No row may occur twice."""
    return _Take.apply(frames.flatten(0, 1), rows)


class _Take(torch.autograd.Function):
    """index_select for rows that are all different: its backward pass copies, and has nothing to add up."""

    @staticmethod
    def forward(ctx: Any, frames: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.rows, ctx.count = rows, len(frames)
        return frames.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, ctx.rows, gradient), None

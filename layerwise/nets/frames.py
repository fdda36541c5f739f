"""Frames (B, L, C, ...) as the vectors that objectives and probes see."""

from typing import Any

import torch


def vectors(frames: torch.Tensor) -> torch.Tensor:
    """One vector per frame: (B, L, C, ...) to (B, L, C), the mean over what lies behind the channels."""
    return frames if frames.dim() == 3 else frames.flatten(3).mean(3)


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

"""Kernels of torch that compute in evaluation as they do in training, and take what was rehearsed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def same_attention() -> Iterator[None]:
    """Transformer layers in evaluation compute as in training: their other way has no rehearsal, and rounds differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def same_recurrence() -> Iterator[None]:
    """LSTMs on a CPU compute step by step, as rehearsed: oneDNN's kernel keeps several times as much for the backward pass."""
    backend: Any = torch.backends.mkldnn
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before

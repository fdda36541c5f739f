"""Predicts a peak without the memory, the data or the GPU: the work runs on fake tensors under the meter.

Fake tensors carry shapes and no values (torch's FakeTensorMode), so a step of a large network takes a fraction of a
second, and the meter counts the very storages that it would count on the device.
"""

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerwise.memory.meter import Meter

DEVICE = torch.device("cpu")
"""Where rehearsals take place, whatever the device of the run: on fake CUDA tensors torch calls cuDNN's recurrent kernels
for real. A GPU's own workspaces come on top (`memory.device.workspace_bytes`)."""


def rehearse(work: Callable[[Meter], None], limit: int | None = None) -> Meter:
    """The meter after `work`, which builds all its tensors itself, on DEVICE.

    Raises BudgetError with the first byte beyond the limit.
    """
    with FakeTensorMode(allow_fallback_kernels=False), Meter(DEVICE, limit) as meter:
        work(meter)
    return meter

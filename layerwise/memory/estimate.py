"""Predicts a peak without the memory, the data or the GPU: the work runs on fake tensors under the meter.

Fake tensors carry shapes and no values (torch's FakeTensorMode), so a step of a large network takes a fraction of a
second, and the meter counts the very storages that it would count on the device.
"""

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerwise.memory.meter import Meter


def rehearse(work: Callable[[Meter], None], device: torch.device) -> Meter:
    """The meter after `work`, which builds all its tensors itself, on `device`."""
    with FakeTensorMode(), Meter(device) as meter:
        work(meter)
    return meter

"""First weights: drawn on the CPU and copied from there, so that a seed gives the same ones on every device."""

from collections.abc import Callable

import torch
from torch._guards import detect_fake_mode

from layerwise.nets.copying import AnyModule, copied


def with_first_weights(build: Callable[[], AnyModule], seed: int, device: torch.device | str) -> AnyModule:
    """What `build` makes on torch's default device, on this one, initialised from the seed; no generator is changed."""
    device = torch.device(device)
    without_values = device.type == "meta" or detect_fake_mode() is not None
    with torch.random.fork_rng(devices=[]), torch.device(device if without_values else "cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        built = build()
    return built if without_values or device.type == "cpu" else copied(built, device)

"""Measures a GPU in a process that ends: `python -m layerwise.engines.elsewhere DEVICE`.

A process that only plans, while others train, so takes nothing of the GPU itself: a context cannot be given back.
"""

import json
import subprocess
import sys

import torch

from layerwise.importing import python_module
from layerwise.memory.driver import CARDS, Card, context_bytes, free_for_tensors
from layerwise.memory.rates import RATES, Rates, measured_rates

PATIENCE_SECONDS = 300


def measure_elsewhere(device: torch.device) -> None:
    """From now on this process knows what it would measure. Where that fails, it measures by itself when it needs to."""
    command = [*python_module("layerwise.engines.elsewhere"), str(device)]
    try:
        printed = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_SECONDS).stdout
        context, free, flops, moved = json.loads(printed)
    except (OSError, subprocess.SubprocessError, ValueError):
        return
    CARDS[device], RATES[device] = Card(context, free), Rates(flops, moved)


def main(name: str) -> None:
    """Prints the figures as JSON."""
    device = torch.device(name)
    context, rates = context_bytes(device), measured_rates(device)
    print(json.dumps([context, free_for_tensors(device), rates.flops, rates.bytes]))


if __name__ == "__main__":
    main(*sys.argv[1:])

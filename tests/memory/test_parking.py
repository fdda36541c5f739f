"""What is offloaded leaves the device, and comes back to the bit."""

import torch

from layerwise.memory.device import offloaded
from layerwise.memory.meter import Meter

CPU = torch.device("cpu")


def test_parked_tensors_hold_nothing_on_the_device_and_come_back_to_the_bit() -> None:
    with Meter(CPU) as meter:
        layer = torch.nn.Linear(100, 100)
        held, before = meter.live, [parameter.detach().numpy().copy() for parameter in layer.parameters()]
        with offloaded(layer.parameters(), CPU):
            assert meter.live == 0
        assert meter.live == held
    for parameter, value in zip(layer.parameters(), before, strict=True):
        assert parameter.detach().numpy().tobytes() == value.tobytes()


def test_they_come_back_after_an_error_too() -> None:
    tensor = torch.arange(3.0)
    try:
        with offloaded([tensor], CPU):
            raise ValueError
    except ValueError:
        pass
    assert tensor.tolist() == [0, 1, 2]

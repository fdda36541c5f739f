"""How fast a device is: measured without holding it."""

import pytest
import torch

from layerwise.memory import rates

CPU = torch.device("cpu")


def test_measuring_gives_back_what_it_took_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[torch.device] = []
    monkeypatch.setattr(rates, "return_free_blocks", given_back.append)
    monkeypatch.setattr(rates, "RATES", {})
    found = rates.measured_rates(CPU)
    assert found.flops > found.bytes > 0
    assert given_back == [CPU]

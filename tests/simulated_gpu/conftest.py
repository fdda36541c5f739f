"""The simulated GPU, for one test."""

from collections.abc import Iterator

import pytest
from simulated_gpu import SimulatedGPU
from torch_cuda import installed


@pytest.fixture
def gpu() -> Iterator[SimulatedGPU]:
    """torch's cuda:0 for as long as the test lasts: 4 GiB, of which the context takes 400 MiB."""
    with installed(SimulatedGPU()) as device:
        yield device

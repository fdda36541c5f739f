"""Whatever is trained, and however it is laid out, comes out on the simulated GPU as on the CPU, to the bit."""

from pathlib import Path

import pytest
from gpu_cases import CASES, outcome
from simulated_gpu import SimulatedGPU


@pytest.mark.parametrize("name", CASES)
def test_a_run_comes_out_the_same(gpu: SimulatedGPU, name: str, tmp_path: Path) -> None:
    of_host = outcome(CASES[name], "cpu", tmp_path / "cpu")
    assert gpu.counts.kernels == 0
    of_device = outcome(CASES[name], "cuda", tmp_path / "cuda")
    assert gpu.counts.kernels > 100
    assert of_device == of_host

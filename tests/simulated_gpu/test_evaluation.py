"""Probes, extraction, comparisons and the encoder give on the simulated GPU what they give on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from gpu_cases import EVERYWHERE, SPEECH
from simulated_gpu import SimulatedGPU

import layerwise
from layerwise.config import Config, resolve
from layerwise.engines.run import run
from layerwise.evaluate.compare import compare

Made = Callable[[str], Config]


@pytest.fixture
def config(tmp_path: Path) -> Made:
    """config(device): a run on twelve streams of noise that differ in their level."""
    rng = np.random.default_rng(0)
    kinds = np.arange(12) % 2
    with h5py.File(tmp_path / "streams.h5", "w") as file:
        file["streams"] = (rng.standard_normal((12, 400, 1)) * (1 + kinds[:, None, None])).astype(np.float32)
        file["labels/kind"] = kinds
    source = f"h5:{tmp_path / 'streams.h5'}:streams"

    def make(device: str) -> Config:
        places = {"out": str(tmp_path / device / "run"), "cache.dir": str(tmp_path / device / "cache")}
        given = {"data.source": source, "training.device": device, "net.context": 0}
        return resolve(overrides={**EVERYWHERE, **SPEECH, **places, **given})

    return make


def test_probes_features_and_the_encoder_are_the_same(gpu: SimulatedGPU, config: Made, tmp_path: Path) -> None:
    def found(device: str) -> list[Any]:
        made = config(device)
        trained = run(made).paths.out
        errors = [layerwise.probe(trained, "kind").stages]
        file = tmp_path / f"{device}.npy"
        for cache in (tmp_path / device / "cache").rglob("*.h5"):
            cache.unlink()
        errors.append(
            layerwise.probe(trained, "kind", classifier="knn").stages
        )  # of features that are worked out again
        layerwise.extract(trained, made.data.source, file)
        encoder = layerwise.load(trained).to(device)
        streams = torch.randn(2, 300, 1, generator=torch.Generator().manual_seed(0))
        features = encoder(streams.to(device))
        assert features.device.type == device
        return [repr(errors), np.load(file).tobytes(), features.tolist()]

    expected = found("cpu")
    assert gpu.counts.kernels == 0
    assert found("cuda") == expected


def test_a_comparison_is_the_same(gpu: SimulatedGPU, config: Made) -> None:
    methods = ["greedy-infomax", "untrained"]
    of_host, of_device = (
        [
            (each.method, each.seed, each.errors)
            for each in compare(config(device), "kind", seeds=[0], methods=methods).outcomes
        ]
        for device in ("cpu", "cuda")
    )
    assert of_device == of_host
    assert len(of_host) == 2

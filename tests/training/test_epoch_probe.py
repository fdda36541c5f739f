"""What is shown of a stage while it trains is of training samples alone, and tells what can be told."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError
from layerwise.training.epoch_probe import EpochProbe
from layerwise.training.loader import SourceLoader
from layerwise.training.samples import HELD_OUT, TEST, TRAIN
from layerwise.training.spec import StageSpec

Planned = Callable[..., tuple[Config, list[StageSpec]]]
Noise = Callable[[Config], DataSet]


def test_training_samples_alone_are_asked(planned_stages: Planned, noise_data: Noise) -> None:
    config, (spec, *_) = planned_stages("speech")
    kinds = np.array([f"kind {number % 3}" for number in range(24)])
    data = replace(noise_data(config), labels={"one": np.array(["a"] * 24), "kind": kinds})
    split = np.array([TRAIN] * 17 + [HELD_OUT] * 3 + [TEST] * 4)
    probe = EpochProbe.of(config, data, split, spec, SourceLoader(data))
    assert set(probe.epoch.samples.tolist()) <= set(range(17))
    assert len(probe.epoch.samples) == 16  # whole batches of four
    assert [f"kind {number}" for number in probe.classes.tolist()] == kinds[probe.epoch.samples].tolist()
    telling = torch.nn.functional.one_hot(probe.classes, 3).float() + 0.01 * torch.randn(16, 3)
    assert probe.error(telling) == 0
    with pytest.raises(ConfigError, match="these data have none"):
        EpochProbe.of(config, noise_data(config), split, spec, SourceLoader(noise_data(config)))

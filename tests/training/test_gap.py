"""The gap between a context and its targets: steps of the data, in as many rows as each stage makes of them."""

from typing import cast

import numpy as np
import pytest
import torch

from layerwise.config import Config, resolve
from layerwise.data.open import as_data
from layerwise.errors import ConfigError
from layerwise.nets import build_network
from layerwise.objectives.contrastive import InfoNCE
from layerwise.training.spec import StageSpec, stage_specs


def config_with(**objective: object) -> Config:
    net = {
        "net.width": 8,
        "net.kernels": (10, 8, 4),
        "net.strides": (5, 4, 2),
        "net.paddings": (2, 2, 2),
        "data.window": 2000,
    }
    return resolve("demo", overrides=net | {f"objective.{name}": value for name, value in objective.items()})


def stages(config: Config) -> list[StageSpec]:
    data = as_data([(np.ones((4000, 1), np.float32), "a")] * 4, config.data)
    network = build_network(config.net, data.frame_shape, 0)
    return stage_specs(config, data, network, [range(layer, layer + 1) for layer in range(len(network.layers))])


@pytest.mark.parametrize(("gap", "rows"), [(0, [0, 0, 0]), (39, [7, 1, 0]), (80, [16, 4, 2])])
def test_each_stage_leaves_out_as_many_rows_as_it_makes_of_the_gap(gap: int, rows: list[int]) -> None:
    config = config_with(gap=gap)
    for spec, between in zip(stages(config), rows, strict=True):
        assert spec.rows_between == between
        assert cast(InfoNCE, spec.build_objective(config, torch.device("cpu"))).skip == between


def test_a_gap_that_leaves_no_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is 140 rows of stage 1, which leaves no target .* give a lower gap"):
        stages(config_with(gap=700))
    assert stages(config_with(gap=700, anchors=300))[0].rows_between == 140


def test_a_skip_that_leaves_no_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="skip 127 leaves no target among anchors 128"):
        config_with(skip=127)
    assert config_with(skip=126).objective.skip == 126

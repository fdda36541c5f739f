"""What a step costs: operations by the layers that run, and how often."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from layerwise.config import Config
from layerwise.memory.plan import MemoryPlan
from layerwise.training.spec import StageSpec
from layerwise.training.work import step_flops

Planned = Callable[..., tuple[Config, list[StageSpec]]]
NET = {"net.kernels": [10, 8, 4], "net.strides": [5, 4, 2], "net.paddings": [2, 2, 1], "net.context": 0}


@pytest.fixture(scope="module")
def stage(planned_stages: Planned) -> tuple[Config, StageSpec, list[int]]:
    """Three convolutions, and the operations of the forward pass of a batch in each of them."""
    config, (spec,) = planned_stages("speech", **NET, **{"training.stages": 1})
    frames, channels, width, of_layers = spec.window.frames, 1, config.net.width, []
    for layer, kernel in zip(spec.shapes.layers.values(), config.net.kernels, strict=True):
        frames = int(layer.out_length(frames))
        of_layers.append(config.training.batch_size * 2 * frames * kernel * channels * width)
        channels = width
    return config, spec, of_layers


def test_slices_and_streamed_steps_run_every_layer_twice(stage: tuple[Config, StageSpec, list[int]]) -> None:
    config, spec, forward = stage
    whole = MemoryPlan(4, 4)
    for plan in (MemoryPlan(4, 2), MemoryPlan(4, 4, parts=1), MemoryPlan(4, 1, parts=4)):
        assert step_flops(config, spec, plan) - step_flops(config, spec, whole) == sum(forward)
    on_host = replace(whole, optimizer_on_host=True, predictors=1)
    assert step_flops(config, spec, on_host) == step_flops(config, spec, whole)


def test_recomputing_runs_every_layer_but_the_last_once_more(stage: tuple[Config, StageSpec, list[int]]) -> None:
    config, spec, forward = stage
    for plan in (MemoryPlan(4, 4), MemoryPlan(4, 1)):
        again = replace(plan, recompute=True)
        assert step_flops(config, spec, again) - step_flops(config, spec, plan) == sum(forward[:-1])

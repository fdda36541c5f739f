"""Where a network is cut: the cut whose largest stage takes the least memory, and the fewest stages that a budget holds.

Every layer runs once on fake tensors; what a stage of several layers would take follows from what its layers keep and
what they need for a moment. Predictions for the stages of the chosen cut are then exact (`training.planner`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError
from layerwise.memory.estimate import rehearse
from layerwise.memory.meter import Meter
from layerwise.memory.partition import partition
from layerwise.memory.placement import Placement
from layerwise.nets import Network, build_network
from layerwise.nets.network import ranges
from layerwise.training.plan import StagePlan, plan_stages
from layerwise.training.planner import fitting_layout, training_peak


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Bytes that a layer takes in the training of a whole batch."""

    static: int
    """Its parameters, their gradients and Adam's two moments."""
    objective: int
    """The objective's parameters and moments, were this the last layer of a stage."""
    inputs: int
    kept: int
    """From its forward to its backward pass, its output included."""
    transient: int
    """The larger of its two highest points, forward and backward, above its inputs; what is kept included."""
    last: int
    """Its highest point as the last layer of a stage, with the loss, above its inputs: of its output a part is kept."""


def stage_cost(layers: list[LayerCost]) -> int:
    """Estimated peak of a stage of these layers, in bytes; exact for a single one."""
    *lower, last = layers
    highest, below = last.last, 0
    for layer in lower:
        highest = max(highest, below + layer.transient)
        below += layer.kept
    if lower:
        highest = max(highest, below + last.last, below + last.transient)
    return sum(layer.static for layer in layers) + last.objective + layers[0].inputs + highest


def plan_run(
    config: Config,
    data: DataSet,
    device: torch.device,
    network: Network | None = None,
    sizes: Sequence[int] | None = None,
) -> list[StagePlan]:
    """The stages of a run: cut into `sizes` layers each where an earlier start has cut it so; else as the options say.

    With no number of stages in the options they are the network's own, and under a budget the fewest that it holds: each
    trains in one pass over the batch, with its optimizer on the device. (In many passes almost anything fits, at many
    times the time.) Where no number is held so, the finest cut is taken.
    Raises ConfigError where the network, the cut or the window do not fit the data.
    """
    network = network or build_network(config.net, data.frame_shape)
    stages, natural = config.training.stages, plan_stages(config, data, network, network.natural_ranges)
    if sizes is not None and sum(sizes) == len(network.layers):
        return plan_stages(config, data, network, ranges(sizes))
    if stages == len(natural) or (stages is None and config.memory.gpu_mem is None):
        return natural
    if stages is not None and stages > len(network.layers):
        most = len(network.layers)
        raise ConfigError(
            f"--stages {stages}: this network can be cut into at most {most} stages; give a number from 1 to {most} "
            f"(its natural number is {len(natural)}). {network.why_no_finer()}".rstrip()
        )
    costs = layer_costs(config, data, network, device)
    if stages is not None:
        return _best(config, data, network, costs, stages)
    for count in range(1, len(network.layers) + 1):
        plans = natural if count == len(natural) else _best(config, data, network, costs, count)
        # The largest first: where it does not fit, the others need not be looked at.
        order = sorted(plans, key=lambda plan: -stage_cost(costs[plan.layers.start : plan.layers.stop]))
        if all(_is_held(config, plan, device) for plan in order):
            return plans
    return plans


def layer_costs(config: Config, data: DataSet, network: Network, device: torch.device) -> list[LayerCost]:
    """What each layer takes at full windows."""
    finest = plan_stages(config, data, network, ranges([1] * len(network.layers)))
    return [_layer_cost(config, plan, device) for plan in finest]


def _best(config: Config, data: DataSet, network: Network, costs: list[LayerCost], stages: int) -> list[StagePlan]:
    cut = partition(lambda start, stop: stage_cost(costs[start:stop]), len(costs), stages)
    return plan_stages(config, data, network, cut)


def _is_held(config: Config, plan: StagePlan, device: torch.device) -> bool:
    layout = fitting_layout(config, plan, device)
    return layout is not None and layout.placement.passes == 1 and not layout.placement.optimizer_on_host


def _layer_cost(config: Config, plan: StagePlan, device: torch.device) -> LayerCost:
    size, frames = config.training.batch_size, plan.window.frames
    found: dict[str, int] = {}

    def forward_and_backward(meter: Meter) -> None:
        module = plan.build_module(config.training.seed, device)
        static = meter.live
        x = torch.zeros(size, frames, *plan.frame_shape, device=device, requires_grad=plan.stage > 1)
        before = meter.live
        meter.reset_peak()
        _, outputs = module(x, np.full(size, frames))
        found.update(static=static, inputs=before - static, kept=meter.live - before)
        outputs.backward(torch.zeros_like(outputs))
        found.update(transient=meter.peak - before)

    rehearse(forward_and_backward, device)
    predictors = sum(value.numel() for value in plan.build_objective(config, torch.device("meta")).parameters())
    whole = training_peak(config, plan, device, Placement(size, size)).bytes
    static, objective, inputs = 4 * found["static"], 3 * 4 * predictors, found["inputs"]
    return LayerCost(
        static=static,
        objective=objective,
        inputs=inputs,
        kept=found["kept"],
        transient=found["transient"],
        last=whole - static - objective - inputs,
    )

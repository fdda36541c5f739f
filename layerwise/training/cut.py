"""Where a network is cut: the cut whose largest stage takes the least memory, and the fewest stages that a budget holds.

Every layer runs once on fake tensors; what a stage of several layers would take follows from what its layers keep and
what they need for a moment. Predictions for the stages of the chosen cut are then exact (`training.training_peak`).

Splits a row of units into consecutive parts so that the most expensive part is as cheap as can be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch

from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError
from layerwise.memory.estimate import DEVICE, rehearse
from layerwise.memory.meter import Meter
from layerwise.memory.plan import Placement
from layerwise.nets import build_network
from layerwise.nets.network import Network, ranges
from layerwise.training.budget import held_at_all, held_in_one_pass
from layerwise.training.optimizer import Optimization
from layerwise.training.peaks import training_peak
from layerwise.training.spec import StageSpec, stage_specs


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
    first: int
    """The same as the first layer of a stage: its inputs need no gradient."""
    rows: int
    """What the objective scores, were this the last layer, and its gradient: both stay while the layers below run back."""
    last: int
    """Its highest point as the last layer of a stage, with the loss, above its inputs: of its output a part is kept."""


def stage_cost(layers: list[LayerCost]) -> int:
    """Estimated peak of a stage of these layers, in bytes; exact for a single one."""
    *lower, last = layers
    if not lower:
        return last.static + last.objective + last.inputs + last.last
    highest, below = 0, 0
    for layer in lower:
        transient = layer.first if layer is layers[0] else layer.transient
        highest = max(highest, below + transient + last.rows)
        below += layer.kept
    highest = max(highest, below + last.last, below + last.transient)
    return sum(layer.static for layer in layers) + last.objective + layers[0].inputs + highest


def cut_network(
    config: Config,
    data: DataSet,
    device: torch.device,
    network: Network | None = None,
    sizes: Sequence[int] | None = None,
    optimization: Optimization | None = None,
) -> list[StageSpec]:
    """The stages of a run: cut into `sizes` layers each where given, and where they are this network's; else as the options
    say. All at once, they are the parts of one stage. optimization: in place of Adam.

    With no number of stages in the options they are the network's own, and under a budget the fewest that it holds: each
    trains in one pass over the batch, with its optimizer on the device. (In many passes almost anything fits, at many
    times the time.) Where no number is held so, the largest number is taken that is held at all.
    Raises ConfigError where the network, the cut or the window do not fit the data.
    """
    network = network or build_network(config.net, data.frame_shape, config.training.seed)
    if config.training.schedule == "simultaneous":
        return [_all_at_once(config, data, network, sizes, optimization)]
    stages_of: StagesOf = partial(stage_specs, config, data, network, optimization=optimization)
    stages, natural = config.training.stages, stages_of(network.natural_ranges)
    if sizes is not None and sum(sizes) == len(network.layers):
        return stages_of(ranges(sizes))
    if stages == len(natural) or (stages is None and config.memory.gpu_mem is None):
        return natural
    if stages is not None and stages > len(network.layers):
        most = len(network.layers)
        raise ConfigError(
            f"--stages {stages}: this network can be cut into at most {most} stages; give a number from 1 to {most} "
            f"(its natural number is {len(natural)}). {network.why_no_finer()}".rstrip()
        )
    costs = layer_costs(config, data, network)
    if stages is not None:
        return _best(stages_of, costs, stages)
    cuts = [
        natural if count == len(natural) else _best(stages_of, costs, count)
        for count in range(1, len(network.layers) + 1)
    ]

    def held(specs: list[StageSpec], holds: Callable[[Config, StageSpec, torch.device], bool]) -> bool:
        # The largest first: where it does not fit, the others need not be looked at.
        order = sorted(specs, key=lambda spec: -stage_cost(costs[spec.layers.start : spec.layers.stop]))
        return all(holds(config, spec, device) for spec in order)

    for specs in cuts:
        if held(specs, held_in_one_pass):
            return specs
    # The finest is not always the smallest: its objectives have more to score.
    return next((specs for specs in reversed(cuts) if held(specs, held_at_all)), cuts[-1])


StagesOf = Callable[[Sequence[range]], list[StageSpec]]


def _all_at_once(
    config: Config,
    data: DataSet,
    network: Network,
    sizes: Sequence[int] | None,
    optimization: Optimization | None,
) -> StageSpec:
    """The whole network as one stage whose parts are the stages of the sequential schedule."""
    if config.memory.gpu_mem is not None:
        raise ConfigError(
            "--gpu-mem holds one stage at a time, and training.schedule simultaneous keeps all of them on the device; "
            "leave one of the two out."
        )
    sequential = config.model_copy(update={"training": config.training.model_copy(update={"schedule": "sequential"})})
    parts = cut_network(sequential, data, torch.device("cpu"), network, sizes, optimization)
    (whole,) = stage_specs(config, data, network, ranges([len(network.layers)]), optimization)
    return replace(whole, parts=tuple(parts))


def layer_costs(config: Config, data: DataSet, network: Network) -> list[LayerCost]:
    """What each layer takes at full windows."""
    finest = stage_specs(config, data, network, ranges([1] * len(network.layers)))
    return [_layer_cost(config, spec) for spec in finest]


def _best(stages_of: StagesOf, costs: list[LayerCost], stages: int) -> list[StageSpec]:
    return stages_of(partition(lambda start, stop: stage_cost(costs[start:stop]), len(costs), stages))


def _layer_cost(config: Config, spec: StageSpec) -> LayerCost:
    size, frames = config.training.batch_size, spec.window.frames
    static, inputs, kept, transient = _alone(config, spec, below=spec.stage > 1)
    first = _alone(config, spec, below=False)[3] if spec.stage > 1 else transient
    lengths = np.full(size, int(spec.build_module(0, torch.device("meta")).out_length(frames)))
    objective = spec.build_objective(config, torch.device("meta"))
    classes = np.zeros(size, dtype=np.int64)
    draw = objective.draw(lengths, int(lengths[0]), spec.window.columns, np.random.default_rng(0), 1, classes)[0]
    predictors = 3 * 4 * sum(value.numel() for value in objective.parameters())
    whole = training_peak(config, spec, Placement(size, size)).bytes
    return LayerCost(
        static=4 * static,
        objective=predictors,
        inputs=inputs,
        kept=kept,
        transient=transient,
        first=first,
        rows=2 * 4 * spec.target_channels * len(draw.rows),
        last=whole - 4 * static - predictors - inputs,
    )


def _alone(config: Config, spec: StageSpec, below: bool) -> tuple[int, int, int, int]:
    """Bytes of a layer's parameters, of its inputs, of what it keeps, and of its highest point above its inputs.

    below: whether there is a layer below it in its stage, which needs the gradient of the inputs.
    """
    size, frames = config.training.batch_size, spec.window.frames
    found: list[int] = []

    def forward_and_backward(meter: Meter) -> None:
        module = spec.build_module(config.training.seed, DEVICE)
        static = meter.live
        x = torch.zeros(size, frames, *spec.frame_shape, device=DEVICE, requires_grad=below)
        before = meter.live
        meter.reset_peak()
        _, outputs = module(x, np.full(size, frames))
        kept = meter.live - before
        outputs.backward(torch.zeros_like(outputs))
        found.extend((static, before - static, kept, meter.peak - before))

    rehearse(forward_and_backward)
    static, inputs, kept, highest = found
    return static, inputs, kept, highest


def partition(cost: Callable[[int, int], int], units: int, parts: int) -> list[range]:
    """Units 0 to units - 1 in exactly `parts` consecutive, non-empty ranges with the smallest possible largest cost.

    `cost(start, stop)` prices units start to stop - 1; it need not grow with the range, and each range is priced at
    most once. Among the splits with the smallest largest cost, one with the smallest sum of costs is taken.
    Raises ValueError where there are fewer units than parts, or no part is asked for.
    """
    if not 1 <= parts <= units:
        raise ValueError(f"{units} units cannot be split into {parts} parts: give a number from 1 to {units}.")
    price = cache(cost)
    largest = _smallest_largest_cost(price, units, parts)
    return _cheapest_split(price, units, parts, largest)


def _smallest_largest_cost(price: Callable[[int, int], int], units: int, parts: int) -> int:
    best = {stop: price(0, stop) for stop in range(1, units - parts + 2)}
    for part in range(2, parts + 1):
        best = {
            stop: min(max(best[start], price(start, stop)) for start in range(part - 1, stop))
            for stop in range(part, units - parts + part + 1)
        }
    return best[units]


def _cheapest_split(price: Callable[[int, int], int], units: int, parts: int, largest: int) -> list[range]:
    """The split with the smallest sum of costs among those whose every range costs `largest` at most."""
    totals = {0: 0}
    starts: list[dict[int, int]] = []
    for part in range(1, parts + 1):
        best = {}
        for stop in range(part, units - parts + part + 1):
            affordable = [start for start in totals if start < stop and price(start, stop) <= largest]
            if affordable:
                best[stop] = min((totals[start] + price(start, stop), start) for start in affordable)
        totals = {stop: total for stop, (total, _) in best.items()}
        starts.append({stop: start for stop, (_, start) in best.items()})
    ranges: list[range] = []
    stop = units
    for start_of in reversed(starts):
        ranges.insert(0, range(start_of[stop], stop))
        stop = start_of[stop]
    return ranges

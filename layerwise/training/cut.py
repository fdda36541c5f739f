"""Where a network is cut: the cut whose largest stage takes the least memory, and the fewest stages that a budget holds.

Each layer runs once on fake tensors. What a stage of several layers takes is estimated from what its layers keep and what
they need for a moment; what the stages of the chosen cut take is then predicted exactly (`training.training_peak`)."""

import math
import operator
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch

from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError
from layerwise.memory.meter import REHEARSED_ON, rehearsal
from layerwise.memory.plan import MemoryPlan
from layerwise.nets import build_network
from layerwise.nets.network import Network, memoised_per, ranges
from layerwise.training.budget import held_at_all, smallest_budget
from layerwise.training.optimizer import Optimization
from layerwise.training.spec import StageSpec, stage_specs
from layerwise.training.training_peak import training_peak
from layerwise.training.work import scored_rows

StagesOf = Callable[[Sequence[range]], list[StageSpec]]


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

    With no number of stages in the options they are the network's own; under a budget, those of them that it does not hold
    are cut further. `fewest` are the fewest that the budget holds.
    Raises ConfigError where the network, the cut or the window do not fit the data.
    """
    network = network or build_network(config.net, data.frame_shape, config.training.seed)
    if config.training.schedule == "simultaneous":
        return [_all_at_once(config, data, network, sizes, optimization)]
    stages_of: StagesOf = partial(stage_specs, config, data, network, optimization=optimization)
    count, natural, most = config.training.stages, network.natural_ranges, len(network.layers)
    if config.net.at and count is not None:
        raise ConfigError(f"--at {','.join(config.net.at)} says where the stages begin, so leave --stages {count} out.")
    if sizes is not None and sum(sizes) == most:
        return stages_of(ranges(sizes))
    if count is None or count == len(natural):
        return (
            stages_of(natural)
            if count or config.memory.gpu_mem is None
            else _refined(config, stages_of, natural, device)
        )
    if count == "fewest":
        return _fewest(config, stages_of, natural, device)
    if count > most:
        raise ConfigError(
            f"--stages {count}: this network can be cut into at most {most} stages; give a number from 1 to {most} "
            f"(its natural number is {len(natural)}). {network.why_no_finer()}".rstrip()
        )
    return stages_of(_best_cut(_costs(config, stages_of, range(most)), count))


def _refined(config: Config, stages_of: StagesOf, cut: list[range], device: torch.device) -> list[StageSpec]:
    """Stages that the budget does not hold are halved, for as long as there are such that can be."""
    while True:
        specs = stages_of(cut)
        too_large = [spec for spec in specs if len(spec.layers) > 1 and not held_at_all(config, spec, device)]
        if not too_large:
            return specs
        whole = max(too_large, key=lambda spec: smallest_budget(config, spec, device)).layers
        halves = _best_cut(_costs(config, stages_of, whole), 2)
        parts = [range(whole.start + half.start, whole.start + half.stop) for half in halves]
        cut = [part for layers in cut for part in (parts if layers == whole else [layers])]


def _fewest(config: Config, stages_of: StagesOf, natural: list[range], device: torch.device) -> list[StageSpec]:
    """The fewest stages that the budget holds; where it holds none, the finest cut.

    A part of a stage is taken to be held where the stage is.
    """
    most = natural[-1].stop
    if config.memory.gpu_mem is None:
        return stages_of([range(most)])
    longest = _longest_held(config, stages_of, most, device)
    even = natural if len(natural) == len(longest) else _best_cut(_costs(config, stages_of, range(most)), len(longest))
    for specs in map(stages_of, (even, longest)):
        if all(held_at_all(config, spec, device) for spec in specs):
            return specs
    return stages_of(ranges([1] * most))


def _longest_held(config: Config, stages_of: StagesOf, most: int, device: torch.device) -> list[range]:
    """Stages from the first on, each as long as the budget holds it, or of one layer."""

    def is_too_long(start: int, stop: int) -> bool:
        around = (range(start), range(start, stop), range(stop, most))
        (spec,) = (spec for spec in stages_of([part for part in around if part]) if spec.layers.start == start)
        return not held_at_all(config, spec, device)

    cut, start = [], 0
    while start < most:
        stop = start + 1 + bisect_left(range(start + 2, most + 1), True, key=partial(is_too_long, start))
        cut.append(range(start, stop))
        start = stop
    return cut


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


def _best_cut(costs: list[LayerCost], stages: int) -> list[range]:
    """The cut into so many stages whose largest one takes the least."""
    return partition(lambda start, stop: stage_cost(costs[start:stop]), len(costs), stages)


def _costs(config: Config, stages_of: StagesOf, layers: range) -> list[LayerCost]:
    """What each of these layers takes at full windows."""
    finest = stages_of(ranges([1] * layers.stop))[layers.start :]
    return [_layer_cost(config, spec) for spec in finest]


@memoised_per(StageSpec)
def _layer_cost(config: Config, spec: StageSpec) -> LayerCost:
    size = config.training.batch_size
    alone = first = _without_objective(config, spec, input_gradient=False)
    if spec.stage > 1:
        alone = _without_objective(config, spec, input_gradient=True)
    static = 4 * alone.parameters
    predictors = 3 * 4 * sum(value.numel() for value in spec.build_objective(config, torch.device("meta")).parameters())
    whole = training_peak(config, spec, MemoryPlan(size, size)).bytes
    return LayerCost(
        static=static,
        objective=predictors,
        inputs=alone.inputs,
        kept=alone.kept,
        transient=alone.highest,
        first=first.highest,
        rows=2 * 4 * spec.target_channels * scored_rows(config, spec, 1),
        last=whole - static - predictors - alone.inputs,
    )


@dataclass(frozen=True, slots=True)
class _LayerPeak:
    """Bytes of one forward and backward pass of a layer without an objective."""

    parameters: int
    inputs: int
    kept: int
    """From the forward to the backward pass, above the inputs."""
    highest: int
    """Above the inputs."""


def _without_objective(config: Config, spec: StageSpec, input_gradient: bool) -> _LayerPeak:
    """input_gradient: whether the inputs need a gradient, for a layer below them in the same stage."""
    size, frames = config.training.batch_size, spec.window.frames
    with rehearsal() as meter:
        module = spec.build_module(config.training.seed, REHEARSED_ON)
        parameters = meter.live
        x = torch.zeros(size, frames, *spec.frame_shape, device=REHEARSED_ON, requires_grad=input_gradient)
        before = meter.live
        meter.reset_peak()
        _, outputs = module(x, np.full(size, frames))
        kept = meter.live - before
        outputs.backward(torch.zeros_like(outputs))
    return _LayerPeak(parameters, before - parameters, kept, meter.peak - before)


def partition(cost: Callable[[int, int], int], units: int, parts: int) -> list[range]:
    """Units 0 to units - 1 in exactly `parts` consecutive, non-empty ranges with the smallest possible largest cost.

    `cost(start, stop)` prices units start to stop - 1; it need not grow with the range, and each range is priced at
    most once. Among the splits with the smallest largest cost, one with the smallest sum of costs is taken.
    Raises ValueError where there are fewer units than parts, or no part is asked for.
    """
    if not 1 <= parts <= units:
        raise ValueError(f"{units} units cannot be split into {parts} parts: give a number from 1 to {units}.")
    price = cache(cost)
    largest, _ = _best_split(price, units, parts, -math.inf, max)

    def affordable(start: int, stop: int) -> float:
        return price(start, stop) if price(start, stop) <= largest else math.inf

    return _best_split(affordable, units, parts, 0, operator.add)[1]


def _best_split(
    price: Callable[[int, int], float],
    units: int,
    parts: int,
    nothing: float,
    join: Callable[[float, float], float],
) -> tuple[float, list[range]]:
    """The smallest price of a split, and its ranges. join: the price of a split and one range more; nothing: of no range."""
    best: list[dict[int, tuple[float, int]]] = [{0: (nothing, 0)}]
    """For each number of parts: where they stop, to their smallest price and the start of the last part."""
    for part in range(1, parts + 1):
        totals = {start: total for start, (total, _) in best[-1].items()}
        best.append(
            {
                stop: min((join(totals[start], price(start, stop)), start) for start in totals if start < stop)
                for stop in range(part, units - parts + part + 1)
            }
        )
    split: list[range] = []
    stop = units
    for starts in reversed(best[1:]):
        start = starts[stop][1]
        split.insert(0, range(start, stop))
        stop = start
    return best[-1][units][0], split

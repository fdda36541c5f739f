"""The memory plan of each stage: the cheapest that the budget holds, chosen before anything is trained."""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile

import torch

from layerwise.cache.dtypes import STORED
from layerwise.config import Config
from layerwise.config.options import PRESET_NETWORKS
from layerwise.errors import BudgetError, ConfigError
from layerwise.memory.device import find_device
from layerwise.memory.driver import (
    MARGIN,
    beside_tensors,
    free_for_tensors,
    possible_segments,
    room_for_tensors,
    segments_of,
    why_less_than_budget,
)
from layerwise.memory.meter import REHEARSED_ON
from layerwise.memory.plan import ROOMS_OF_GPU, MemoryPlan, cheapest, families
from layerwise.memory.rates import measured_rates
from layerwise.memory.reserved import Segments
from layerwise.nets.network import memoised_per
from layerwise.stop import StopFlag
from layerwise.training.cache_plan import CachePlan
from layerwise.training.forward import longest_piece, shortest_piece
from layerwise.training.inference_peak import Below, caching_peak, recomputing_peak
from layerwise.training.resident import rows_of_input
from layerwise.training.spec import StageSpec, batch_effects
from layerwise.training.training_peak import training_fits, training_peak
from layerwise.training.work import stage_work, step_cost, step_least_bytes

REFUSED_FIRST = 16
"""Plans that are rehearsed in vain before the smallest one is: where one of the cheapest fits, nobody needs to know that."""


def fit_to_budget(
    config: Config,
    specs: Sequence[StageSpec],
    cache_plan: CachePlan,
    device: torch.device,
    done: Container[int],
    stop: StopFlag,
) -> list[MemoryPlan]:
    """The plan of each stage. done: stages that are trained and cached already, so that theirs need not fit.

    Raises BudgetError that names the neediest stage, Interrupted between two stages.
    """
    plans, refused = [], {}
    for spec in specs:
        stop.raise_if_set("before anything was trained")
        recomputed = cache_plan.below(spec.stage, specs)
        plan = fit_stage(config, spec, device, recomputed, rows_of_input(config, spec, cache_plan))
        if plan is None and spec.stage not in done:
            refused[smallest_budget(config, spec, device, recomputed)] = spec
        plans.append(plan or smallest_plan(config, spec, recomputed, device))
    if refused:
        needed = max(refused)
        raise BudgetError(_too_small(config, refused[needed], needed, device))
    return plans


def fit_stage(
    config: Config, spec: StageSpec, device: torch.device, below: Below = (), input_rows: int = 0
) -> MemoryPlan | None:
    """The plan of a stage that takes the least time of those that the budget holds, or None.

    below: the stages whose outputs are not cached and are recomputed for this one, lowest first. input_rows: of the input,
    where it can stay on the device, see `resident`.
    """
    allowed = plans_by_cost(config, spec, config.memory.flops_per_byte or measured_rates(device).flops_per_byte)
    first, longest, windows = allowed[0][0], longest_piece(spec, config), config.training.batch_size if below else 0
    if config.memory.gpu_mem is None:
        first = replace(first, piece=longest, windows=windows)
        on_gpu = device.type == "cuda"
        return _with_copies_beside(config, spec, below, first, input_rows, device) if on_gpu else first
    room, ways = room_for_tensors(device, config.memory.gpu_mem), possible_segments(device)

    refused: list[MemoryPlan] = []

    def fits(plan: MemoryPlan) -> bool:
        if step_least_bytes(config, spec, plan) > room:
            return False
        if plan == first:
            # Rehearsed to its end and memoised: `_why` tells its peak, for which one broken off would be rehearsed again.
            _least_peak(config, spec, plan, device)
        if any(training_fits(config, spec, plan, room, segments) for segments in ways):
            return True
        refused.append(plan)
        return False

    def hopeful(_: object) -> bool:
        """False once it is known that no plan takes so little; trying all of them one by one would find that out late."""
        smallest = _smallest_in_training(config, spec, device) if len(refused) >= REFUSED_FIRST else None
        return smallest is None or _least_peak(config, spec, smallest, device) <= room

    plan = cheapest(takewhile(hopeful, allowed), fits)
    if plan is None:
        return None
    for segments in ways:
        if not training_fits(config, spec, plan, room, segments):
            continue
        piece_peak = partial(_piece_peak, config, spec, below, segments, plan)
        windows_peak = partial(_windows_peak, config, spec, below, segments)
        piece = _largest_that_fits(longest, shortest_piece(spec, config), piece_peak, room)
        at_once = _largest_that_fits(windows, min(windows, 1), windows_peak, room)
        if piece is not None and at_once is not None:
            why = "" if plan == first else _why(config, spec, plan, first, device)
            expandable = segments is not None and segments.expandable
            if expandable and not why:
                fixed = training_peak(config, spec, plan, ways[0]).bytes
                why = f"segments of a fixed size would take {fixed / 1e6:.1f} MB" if len(ways) > 1 else ""
            plan = replace(plan, piece=piece, windows=at_once, expandable=expandable, why=why)
            return plan if segments is None else _with_copies_beside(config, spec, below, plan, input_rows, device)
    return None


FILLED = 0.9
"""Part of what is free that an input may fill together with its stage where there is no budget: the rest is for what no
rehearsal sees, such as the workspaces of cuDNN, and for other processes."""


def _with_copies_beside(
    config: Config, spec: StageSpec, below: Below, plan: MemoryPlan, input_rows: int, device: torch.device
) -> MemoryPlan:
    """The plan of a stage on a GPU with what keeps its steps from waiting for the host, where there is room for it: the whole
    input on the device, or else the next batch; and pieces that come and go while others are computed.

    Not where other stages recompute the input: they have the device to themselves.
    """
    if below or spec.parts:
        return plan
    budget, segments = config.memory.gpu_mem, segments_of(device, plan.expandable)
    room = int(FILLED * (free_for_tensors(device) - MARGIN)) if budget is None else room_for_tensors(device, budget)

    def caches(plan: MemoryPlan) -> bool:
        return _piece_peak(config, spec, below, segments, plan, plan.piece) <= room

    def fits(plan: MemoryPlan) -> bool:
        try:
            return training_fits(config, spec, plan, room, segments) and caches(plan)
        except ConfigError:  # an optimizer that looks at values cannot be rehearsed, and without a budget need not be
            if budget is not None:
                raise
            return False

    resident = replace(plan, resident=input_rows)
    row_bytes = math.prod(spec.frame_shape) * STORED[config.cache.dtype].tensor.itemsize
    if 0 < input_rows * row_bytes < room and fits(resident):
        plan = resident
    elif plan.at_once:
        ahead = replace(plan, ahead=True)
        plan = ahead if budget is None or training_fits(config, spec, ahead, room, segments) else plan
    overlapped = replace(plan, overlapped=True)
    return overlapped if budget is None or caches(overlapped) else plan


def held_at_all(config: Config, spec: StageSpec, device: torch.device) -> bool:
    """Whether the budget is at least the smallest one of a stage whose input is read, not recomputed."""
    return smallest_budget(config, spec, device) <= (config.memory.gpu_mem or 0)


def smallest_budget(config: Config, spec: StageSpec, device: torch.device, below: Below = ()) -> int:
    """Bytes below which the stage cannot be trained or cached under any plan that the options allow."""
    smallest = smallest_plan(config, spec, below, device)
    return max(peaks_of_plan(config, spec, device, below, smallest)) + beside_tensors(device)


def smallest_plan(
    config: Config, spec: StageSpec, below: Below = (), device: torch.device = REHEARSED_ON
) -> MemoryPlan:
    """The plan that takes the least memory."""
    smallest = _smallest_in_training(config, spec, device)
    plan = replace(
        smallest, piece=shortest_piece(spec, config), windows=min(len(below), 1), why="nothing smaller is left"
    )
    ways = [segments for segments in possible_segments(device) if segments is not None]
    plans = [replace(plan, expandable=segments.expandable) for segments in ways]
    return min(plans, key=lambda each: max(peaks_of_plan(config, spec, device, below, each))) if plans else plan


def _smallest_in_training(config: Config, spec: StageSpec, device: torch.device) -> MemoryPlan:
    least: list[MemoryPlan] = []
    for family in allowed_plans(config, spec):
        plan = family[-1]
        if not any(other.takes_at_most(plan) for other in least):
            least = [other for other in least if not plan.takes_at_most(other)] + [plan]
    return min(least, key=lambda plan: _least_peak(config, spec, plan, device))


def _least_peak(config: Config, spec: StageSpec, plan: MemoryPlan, device: torch.device) -> int:
    """Of training, in the way in which the device reserves the least for it."""
    return min(training_peak(config, spec, plan, segments).bytes for segments in possible_segments(device))


def plans_by_cost(config: Config, spec: StageSpec, flops_per_byte: int) -> list[list[MemoryPlan]]:
    """All plans of a stage that the options allow, those of the least predicted time first; see `families`."""
    return sorted(allowed_plans(config, spec), key=lambda family: step_cost(config, spec, family[0], flops_per_byte))


def allowed_plans(config: Config, spec: StageSpec) -> list[list[MemoryPlan]]:
    """All plans of a stage that the options allow; see `memory.plan.families`. The first is that of the whole batch."""
    return _allowed_plans(config, spec, ROOMS_OF_GPU if find_device(config.training.device).type == "cuda" else ())


@memoised_per(StageSpec)
def _allowed_plans(config: Config, spec: StageSpec, wider: tuple[int, ...]) -> list[list[MemoryPlan]]:
    """wider: further rooms of the loss; configurations are alike whatever their device."""
    effects = batch_effects(spec)
    every = families(
        config.training.batch_size,
        config.memory,
        sliceable=effects.why_unsliceable is None,
        repeatable=effects.repeatable,
        layers=len(spec.layers),
        stacked=stage_work(config, spec).stacked,
        wider=wider,
    )
    return [family for family in every if family]


def peaks_of_plan(
    config: Config, spec: StageSpec, device: torch.device, below: Below, plan: MemoryPlan
) -> tuple[int, int]:
    """Predicted bytes of the training and of the caching pass, the recomputing of their input included."""
    segments = segments_of(device, plan.expandable)
    training = training_peak(config, spec, plan, segments).bytes
    recomputing = _windows_peak(config, spec, below, segments, plan.windows)
    return max(training, recomputing), _piece_peak(config, spec, below, segments, plan, plan.piece)


def _piece_peak(
    config: Config, spec: StageSpec, below: Below, segments: Segments | None, plan: MemoryPlan, piece: int
) -> int:
    """Of one piece of the caching pass, its recomputing included: one long window, or short ones side by side."""
    recomputing = (
        recomputing_peak(config, below, n, -(-piece // n), segments) for n in (1, config.training.batch_size)
    )
    return max(caching_peak(config, spec, piece, segments, plan.overlapped, plan.resident), *recomputing)


def _windows_peak(config: Config, spec: StageSpec, below: Below, segments: Segments | None, windows: int) -> int:
    """Of so many windows whose input is recomputed."""
    return recomputing_peak(config, below, windows, spec.window.frames, segments)


def _largest_that_fits(largest: int, smallest: int, peak: Callable[[int], int], room: int) -> int | None:
    """The largest number by halves, or None where not even the smallest fits."""
    number = largest
    while peak(number) > room:
        if number == smallest:
            return None
        number = max(number // 2, smallest)
    return number


def _why(config: Config, spec: StageSpec, chosen: MemoryPlan, first: MemoryPlan, device: torch.device) -> str:
    """Why a stage does not train in the cheapest way, its first plan."""
    needed, effects = _least_peak(config, spec, first, device), batch_effects(spec)
    why = f"the cheapest way ({first}) would take {needed / 1e6:.1f} MB"
    if effects.why_unsliceable:
        why += f"; {effects.why_unsliceable}, so the batch cannot be sliced"
    if not chosen.whole and effects.uses_randomness:
        why += "; what the module draws at random, as in dropout, differs from what a whole batch would draw"
    return why


def _too_small(config: Config, spec: StageSpec, needed: int, device: torch.device) -> str:
    budget, last = config.memory.gpu_mem, smallest_plan(config, spec, (), device)
    whole = batch_effects(spec).why_unsliceable
    why = f" ({whole}, so the batch cannot be sliced)" if whole else ""
    lower = {"steps": ["data.window"], "patches": ["data.crop"], "whole": []}[config.data.frames]
    lower += ["net.width"] if config.net.name in PRESET_NETWORKS else []
    ways = [f"lower {' or '.join(['--batch-size', *lower] if whole else lower)}"] if whole or lower else []
    ways += ["cut into more --stages"] if len(spec.layers) > 1 else []
    less = why_less_than_budget(device, budget)
    less += " " if less else ""
    return (
        f"--gpu-mem {(budget or 0) / 1e6:g} MB is too small: stage {spec.stage} needs {math.ceil(needed / 1e4) / 100:g} MB "
        f"even as {last}{why}. {less}{', or '.join(['Give at least that', *ways])}."
    )

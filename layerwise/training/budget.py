"""The memory plan of each stage: the cheapest that the budget holds, chosen before anything is trained."""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import replace

import torch

from layerwise.config import Config
from layerwise.config.options import PAPER_NETWORKS
from layerwise.errors import BudgetError
from layerwise.memory.device import context_bytes, find_device, workspace_bytes
from layerwise.memory.plan import ROOMS_OF_GPU, MemoryPlan, cheapest, families
from layerwise.memory.rates import measured_rates
from layerwise.nets.network import memoised_per
from layerwise.stop import StopFlag
from layerwise.training.cache_plan import CachePlan
from layerwise.training.forward import longest_piece, shortest_piece
from layerwise.training.peaks import Below, caching_peak, recomputing_peak, training_fits, training_peak
from layerwise.training.spec import StageSpec, batch_effects
from layerwise.training.work import stage_work, step_cost, step_least_bytes


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
        plan = fit_stage(config, spec, device, recomputed)
        if plan is None and spec.stage not in done:
            refused[smallest_budget(config, spec, device, recomputed)] = spec
        plans.append(plan or smallest_plan(config, spec, recomputed))
    if refused:
        needed = max(refused)
        raise BudgetError(_too_small(config, refused[needed], needed))
    return plans


def fit_stage(config: Config, spec: StageSpec, device: torch.device, below: Below = ()) -> MemoryPlan | None:
    """The plan of a stage that takes the least time of those that the budget holds, or None.

    below: the stages whose outputs are not cached and are recomputed for this one, lowest first.
    """
    allowed = plans_by_cost(config, spec, config.memory.flops_per_byte or measured_rates(device).flops_per_byte)
    first, longest, windows = allowed[0][0], longest_piece(spec, config), config.training.batch_size if below else 0
    if config.memory.gpu_mem is None:
        return replace(first, piece=longest, windows=windows)
    room = _tensor_room(config, device)

    # No plan takes less, and trying all of them one by one would find that out late.
    if training_peak(config, spec, smallest_plan(config, spec)).bytes > room:
        return None

    def fits(plan: MemoryPlan) -> bool:
        return step_least_bytes(config, spec, plan) <= room and training_fits(config, spec, plan, room)

    plan = cheapest(allowed, fits)
    if plan is None:
        return None
    piece = _largest_that_fits(
        longest, shortest_piece(spec, config), lambda piece: _piece_peak(config, spec, below, piece) <= room
    )
    at_once = _largest_that_fits(
        windows, min(windows, 1), lambda count: recomputing_peak(config, below, count, spec.window.frames) <= room
    )
    if piece is None or at_once is None:
        return None
    return replace(plan, piece=piece, windows=at_once, why="" if plan == first else _why(config, spec, plan, first))


def held_at_all(config: Config, spec: StageSpec, device: torch.device) -> bool:
    """Whether the budget is at least the smallest one of a stage whose input is read, not recomputed."""
    return smallest_budget(config, spec, device) <= (config.memory.gpu_mem or 0)


def smallest_budget(config: Config, spec: StageSpec, device: torch.device, below: Below = ()) -> int:
    """Bytes below which the stage cannot be trained or cached under any plan that the options allow."""
    return max(peaks_of_plan(config, spec, device, below, smallest_plan(config, spec, below))) + context_bytes(device)


def smallest_plan(config: Config, spec: StageSpec, below: Below = ()) -> MemoryPlan:
    """The plan that takes the least memory."""
    least: list[MemoryPlan] = []
    for family in allowed_plans(config, spec):
        plan = family[-1]
        if not any(other.takes_at_most(plan) for other in least):
            least = [other for other in least if not plan.takes_at_most(other)] + [plan]
    smallest = min(least, key=lambda plan: training_peak(config, spec, plan).bytes)
    piece, windows = shortest_piece(spec, config), min(len(below), 1)
    return replace(smallest, piece=piece, windows=windows, why="nothing smaller is left")


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
    """Predicted bytes of the training and of the caching pass, the recomputing of their input and workspaces included."""
    training = training_peak(config, spec, plan).bytes
    recomputing = recomputing_peak(config, below, plan.windows, spec.window.frames)
    workspace = workspace_bytes(device)
    return max(training, recomputing) + workspace, _piece_peak(config, spec, below, plan.piece) + workspace


def _tensor_room(config: Config, device: torch.device) -> int:
    """Bytes of the budget that are left for tensors."""
    return (config.memory.gpu_mem or 0) - context_bytes(device) - workspace_bytes(device)


def _piece_peak(config: Config, spec: StageSpec, below: Below, piece: int) -> int:
    """Of one piece of the caching pass, its recomputing included: one long window, or short ones side by side."""
    recomputing = (recomputing_peak(config, below, n, -(-piece // n)) for n in (1, config.training.batch_size))
    return max(caching_peak(config, spec, piece), *recomputing)


def _largest_that_fits(largest: int, smallest: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number by halves, or None where not even the smallest fits."""
    number = largest
    while not fits(number):
        if number == smallest:
            return None
        number = max(number // 2, smallest)
    return number


def _why(config: Config, spec: StageSpec, chosen: MemoryPlan, first: MemoryPlan) -> str:
    """Why a stage does not train in the cheapest way, its first plan."""
    needed, effects = training_peak(config, spec, first).bytes, batch_effects(spec)
    why = f"the cheapest way ({first}) would take {needed / 1e6:.1f} MB"
    if effects.why_unsliceable:
        why += f"; {effects.why_unsliceable}, so the batch cannot be sliced"
    if not chosen.whole and effects.uses_randomness:
        why += "; what the module draws at random, as in dropout, differs from what a whole batch would draw"
    return why


def _too_small(config: Config, spec: StageSpec, needed: int) -> str:
    budget, last = config.memory.gpu_mem, smallest_plan(config, spec)
    whole = batch_effects(spec).why_unsliceable
    why = f" ({whole}, so the batch cannot be sliced)" if whole else ""
    lower = {"steps": ["data.window"], "patches": ["data.crop"], "whole": []}[config.data.frames]
    lower += ["net.width"] if config.net.name in PAPER_NETWORKS else []
    ways = [f"lower {' or '.join(['--batch-size', *lower] if whole else lower)}"] if whole or lower else []
    ways += ["cut into more --stages"] if len(spec.layers) > 1 else []
    return (
        f"--gpu-mem {(budget or 0) / 1e6:g} MB is too small: stage {spec.stage} needs {math.ceil(needed / 1e4) / 100:g} MB "
        f"even as {last}{why}. {', or '.join(['Give at least that', *ways])}."
    )

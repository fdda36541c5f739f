"""How each stage is laid out on the device: the cheapest way that the budget holds, chosen before anything is trained."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from layerwise.config import Config
from layerwise.errors import BudgetError
from layerwise.memory.device import context_bytes, workspace_bytes
from layerwise.memory.plan import Placement, cheapest, families
from layerwise.training.batch_effects import batch_effects
from layerwise.training.forward import longest_piece, shortest_piece
from layerwise.training.peaks import Below, caching_peak, recomputing_peak, training_fits, training_peak
from layerwise.training.spec import StageSpec


@dataclass(frozen=True, slots=True)
class StageLayout:
    """How one stage is laid out on the device."""

    placement: Placement
    piece: int
    """Input frames that are on the device at once in the caching pass."""
    windows: int
    """Windows of the input that are on the device at once while they are recomputed; 0 where a cache or data are read."""
    why: str
    """Why it is not laid out in the cheapest way; empty where it is."""


def lay_out(config: Config, spec: StageSpec, device: torch.device, below: Below = ()) -> StageLayout:
    """The cheapest layout that the budget holds. Raises BudgetError where it holds none.

    below: the stages whose outputs are not cached and are recomputed for this one, lowest first.
    """
    layout = fitting_layout(config, spec, device, below)
    if layout is None:
        raise _too_small(config, spec, device, below)
    return layout


def fitting_layout(config: Config, spec: StageSpec, device: torch.device, below: Below = ()) -> StageLayout | None:
    """The cheapest layout that the budget holds, if there is any."""
    first = every_layout(config, spec)[0][0]
    longest, shortest = longest_piece(spec, config), shortest_piece(spec, config)
    windows = config.training.batch_size if below else 0
    if config.memory.gpu_mem is None:
        return StageLayout(first, longest, windows, "")
    room = config.memory.gpu_mem - context_bytes(device) - workspace_bytes(device)
    placement = cheapest(
        every_layout(config, spec),
        lambda placement: training_fits(config, spec, placement, room),
    )
    if placement is None:
        return None
    piece = _longest_that_fits(longest, shortest, lambda n: _piece_peak(config, spec, below, n) <= room)
    at_once = _longest_that_fits(
        windows, min(windows, 1), lambda n: recomputing_peak(config, below, n, spec.window.frames) <= room
    )
    if piece is None or at_once is None:
        return None
    why = "" if placement == first else _why(config, spec, placement, first)
    return StageLayout(placement, piece, at_once, why)


def held_in_one_pass(config: Config, spec: StageSpec, device: torch.device) -> bool:
    """Whether the budget holds the stage with its optimizer on the device, in one pass over the batch."""
    room = (config.memory.gpu_mem or 0) - context_bytes(device) - workspace_bytes(device)
    families = [family for family in every_layout(config, spec) if family[0].passes == 1]
    kept_there = [family for family in families if not family[0].optimizer_on_host] or families
    trained = any(training_fits(config, spec, family[-1], room) for family in kept_there)
    return trained and caching_peak(config, spec, shortest_piece(spec, config)) <= room


def held_at_all(config: Config, spec: StageSpec, device: torch.device) -> bool:
    """Whether the budget is at least the smallest one of a stage whose input is read, not recomputed."""
    room = (config.memory.gpu_mem or 0) - context_bytes(device) - workspace_bytes(device)
    trained = any(training_fits(config, spec, placement, room) for placement in _smallest_placements(config, spec))
    return trained and _piece_peak(config, spec, (), shortest_piece(spec, config)) <= room


def smallest_layout(config: Config, spec: StageSpec, below: Below = ()) -> StageLayout:
    """The layout that takes the least memory: with the smallest micro-batches, and of these the one that rehearses so."""
    *others, least = _smallest_placements(config, spec)
    for other in reversed(others):
        if training_fits(config, spec, other, training_peak(config, spec, least).bytes):
            least = other
    return StageLayout(least, shortest_piece(spec, config), min(len(below), 1), "nothing smaller is left")


def _smallest_placements(config: Config, spec: StageSpec) -> list[Placement]:
    """One of these takes the least memory.

    More passes and more recomputing do not always take less, so all kinds of them are tried; among the numbers of passes
    the least and the most.
    """
    smallest = [family[-1] for family in every_layout(config, spec)]
    on_host = [layout for layout in smallest if layout.optimizer_on_host] or smallest  # never takes more
    return [layout for layout in on_host if layout.passes in (smallest[0].passes, smallest[-1].passes)]


def every_layout(config: Config, spec: StageSpec) -> list[list[Placement]]:
    """All placements of a stage that the options allow, cheapest first; see `memory.placement.families`."""
    module = spec.build_module(config.training.seed, torch.device("meta"))
    memory = config.memory
    return list(
        families(
            config.training.batch_size,
            sliceable=batch_effects(spec).why_unsliceable is None,
            layers=len(module.layers),
            micro_batch=memory.micro_batch,
            recompute=None if memory.recompute == "auto" else memory.recompute == "always",
            on_host=None if memory.optimizer == "auto" else memory.optimizer == "host",
        )
    )


def smallest_budget(config: Config, spec: StageSpec, device: torch.device, below: Below = ()) -> int:
    """Bytes below which the stage cannot be trained or cached in any layout that the options allow."""
    layout = smallest_layout(config, spec, below)
    return max(peaks(config, spec, device, below, layout)) + context_bytes(device)


def peaks(config: Config, spec: StageSpec, device: torch.device, below: Below, layout: StageLayout) -> tuple[int, int]:
    """Predicted bytes of the training and of the caching pass, the recomputing of their input and workspaces included."""
    training = training_peak(config, spec, layout.placement).bytes
    recomputing = recomputing_peak(config, below, layout.windows, spec.window.frames)
    workspace = workspace_bytes(device)
    return max(training, recomputing) + workspace, _piece_peak(config, spec, below, layout.piece) + workspace


def _piece_peak(config: Config, spec: StageSpec, below: Below, piece: int) -> int:
    """Of one piece of the caching pass, its recomputing included: one long window, or short ones side by side."""
    recomputing = (recomputing_peak(config, below, n, -(-piece // n)) for n in (1, config.training.batch_size))
    return max(caching_peak(config, spec, piece), *recomputing)


def _longest_that_fits(longest: int, shortest: int, fits: Callable[[int], bool]) -> int | None:
    """The longest piece by halves, or None where not even the shortest fits."""
    piece = longest
    while not fits(piece):
        if piece == shortest:
            return None
        piece = max(piece // 2, shortest)
    return piece


def _why(config: Config, spec: StageSpec, chosen: Placement, cheapest_one: Placement) -> str:
    needed, effects = training_peak(config, spec, cheapest_one).bytes, batch_effects(spec)
    why = f"the cheapest way ({cheapest_one}) would take {needed / 1e6:.1f} MB"
    if effects.why_unsliceable:
        why += f"; {effects.why_unsliceable}, so the batch cannot be sliced"
    if not chosen.whole and effects.uses_randomness:
        why += "; what the module draws at random, as in dropout, differs from what a whole batch would draw"
    return why


def _too_small(config: Config, spec: StageSpec, device: torch.device, below: Below) -> BudgetError:
    budget, needed = config.memory.gpu_mem, smallest_budget(config, spec, device, below)
    last = smallest_layout(config, spec, below).placement
    whole = batch_effects(spec).why_unsliceable
    why = f" ({whole}, so the batch cannot be sliced)" if whole else ""
    finer = ", or cut into more --stages" if len(spec.layers) > 1 else ""
    window = "data.window" if spec.window.columns == 1 else "data.crop"
    smaller = f"--batch-size, {window} or net.width" if whole else f"{window} or net.width"
    return BudgetError(
        f"--gpu-mem {(budget or 0) / 1e6:g} MB is too small: stage {spec.stage} needs {math.ceil(needed / 1e4) / 100:g} MB "
        f"even as {last}{why}. Give at least that, or lower {smaller}{finer}."
    )

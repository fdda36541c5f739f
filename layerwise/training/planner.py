"""What each stage needs and how it is laid out under the budget, worked out before anything is trained.

The very steps of a run are rehearsed on fake tensors, so a prediction is not a model of the code but the code itself.
Of many like slices only the first are rehearsed: the others need the same room.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from layerwise.cache.stored import STORED
from layerwise.config import Config, TrainingOptions
from layerwise.data.batches import Batch
from layerwise.errors import BudgetError, ConfigError
from layerwise.memory import microbatch
from layerwise.memory.device import autocast, context_bytes, on_device, workspace_bytes
from layerwise.memory.estimate import DEVICE, rehearse
from layerwise.memory.meter import Kind, Meter
from layerwise.memory.microbatch import Pending, Total
from layerwise.memory.placement import Placement, cheapest, families
from layerwise.nets.module import Module
from layerwise.objectives.protocol import Draw
from layerwise.training.behaviour import behaviour
from layerwise.training.caching import longest_piece, shortest_piece
from layerwise.training.loaded import LoadedStage, Randomness
from layerwise.training.optimizer import Optimizer, State
from layerwise.training.plan import StagePlan
from layerwise.training.remembered import remembered

REHEARSED_SLICES = 2
"""The first makes the gradients; the second adds to them, like all that follow."""

REHEARSED_PASSES = 2

REHEARSED_STEPS = 32
"""Frames of a recurrent layer in the caching pass."""

Below = tuple[StagePlan, ...]

SPREAD = 5
"""Standard deviations by which the rows of a draw may exceed those of the rehearsed one."""


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


def lay_out(config: Config, plan: StagePlan, device: torch.device, below: Below = ()) -> StageLayout:
    """The cheapest layout that the budget holds. Raises BudgetError where it holds none.

    below: the stages whose outputs are not cached and are recomputed for this one, lowest first.
    """
    layout = fitting_layout(config, plan, device, below)
    if layout is None:
        raise _too_small(config, plan, device, below)
    return layout


def fitting_layout(config: Config, plan: StagePlan, device: torch.device, below: Below = ()) -> StageLayout | None:
    """The cheapest layout that the budget holds, if there is any."""
    first = every_layout(config, plan)[0][0]
    longest, shortest = longest_piece(plan, config), shortest_piece(plan, config)
    windows = config.training.batch_size if below else 0
    if config.memory.gpu_mem is None:
        return StageLayout(first, longest, windows, "")
    room = config.memory.gpu_mem - context_bytes(device) - workspace_bytes(device)
    placement = cheapest(
        every_layout(config, plan),
        lambda placement: training_fits(config, plan, placement, room),
    )
    if placement is None:
        return None
    piece = _longest_that_fits(longest, shortest, lambda n: _piece_peak(config, plan, below, n) <= room)
    at_once = _longest_that_fits(
        windows, min(windows, 1), lambda n: recomputing_peak(config, below, n, plan.window.frames) <= room
    )
    if piece is None or at_once is None:
        return None
    why = "" if placement == first else _why(config, plan, placement, first)
    return StageLayout(placement, piece, at_once, why)


def held_in_one_pass(config: Config, plan: StagePlan, device: torch.device) -> bool:
    """Whether the budget holds the stage with its optimizer on the device, in one pass over the batch."""
    room = (config.memory.gpu_mem or 0) - context_bytes(device) - workspace_bytes(device)
    families = [family for family in every_layout(config, plan) if family[0].passes == 1]
    kept_there = [family for family in families if not family[0].optimizer_on_host] or families
    trained = any(training_fits(config, plan, family[-1], room) for family in kept_there)
    return trained and caching_peak(config, plan, shortest_piece(plan, config)) <= room


def held_at_all(config: Config, plan: StagePlan, device: torch.device) -> bool:
    """Whether the budget is at least the smallest one of a stage whose input is read, not recomputed."""
    room = (config.memory.gpu_mem or 0) - context_bytes(device) - workspace_bytes(device)
    trained = any(training_fits(config, plan, placement, room) for placement in _smallest_placements(config, plan))
    return trained and _piece_peak(config, plan, (), shortest_piece(plan, config)) <= room


def smallest_layout(config: Config, plan: StagePlan, below: Below = ()) -> StageLayout:
    """The layout that takes the least memory: with the smallest micro-batches, and of these the one that rehearses so."""
    *others, least = _smallest_placements(config, plan)
    for other in reversed(others):
        if training_fits(config, plan, other, training_peak(config, plan, least).bytes):
            least = other
    return StageLayout(least, shortest_piece(plan, config), min(len(below), 1), "nothing smaller is left")


def _smallest_placements(config: Config, plan: StagePlan) -> list[Placement]:
    """One of these takes the least memory.

    More passes and more recomputing do not always take less, so all kinds of them are tried; among the numbers of passes
    the least and the most.
    """
    smallest = [family[-1] for family in every_layout(config, plan)]
    on_host = [layout for layout in smallest if layout.optimizer_on_host] or smallest  # never takes more
    return [layout for layout in on_host if layout.passes in (smallest[0].passes, smallest[-1].passes)]


def every_layout(config: Config, plan: StagePlan) -> list[list[Placement]]:
    """All placements of a stage that the options allow, cheapest first; see `memory.placement.families`."""
    module = plan.build_module(config.training.seed, torch.device("meta"))
    memory = config.memory
    return list(
        families(
            config.training.batch_size,
            sliceable=behaviour(plan).why_whole is None,
            layers=len(module.layers),
            micro_batch=memory.micro_batch,
            recompute=None if memory.recompute == "auto" else memory.recompute == "always",
            on_host=None if memory.optimizer == "auto" else memory.optimizer == "host",
        )
    )


def smallest_budget(config: Config, plan: StagePlan, device: torch.device, below: Below = ()) -> int:
    """Bytes below which the stage cannot be trained or cached in any layout that the options allow."""
    layout = smallest_layout(config, plan, below)
    return max(peaks(config, plan, device, below, layout)) + context_bytes(device)


def peaks(config: Config, plan: StagePlan, device: torch.device, below: Below, layout: StageLayout) -> tuple[int, int]:
    """Predicted bytes of the training and of the caching pass, the recomputing of their input and workspaces included."""
    training = training_peak(config, plan, layout.placement).bytes
    recomputing = recomputing_peak(config, below, layout.windows, plan.window.frames)
    workspace = workspace_bytes(device)
    return max(training, recomputing) + workspace, _piece_peak(config, plan, below, layout.piece) + workspace


@dataclass(frozen=True, slots=True)
class Peak:
    """A predicted peak in bytes, and what it is made of."""

    bytes: int
    by_kind: dict[Kind, int]


@dataclass(slots=True)
class _Known:
    """What rehearsals have told of the training in one placement."""

    peak: Peak | None = None
    more_than: int | None = None
    """Bytes at which a rehearsal was broken off, where none has reached its end."""


@remembered
def _known(config: Config, plan: StagePlan, placement: Placement) -> _Known:
    return _Known()


def training_peak(config: Config, plan: StagePlan, placement: Placement) -> Peak:
    """Predicted peak of the training pass of a stage, at full windows."""
    known = _known(config, plan, placement)
    if known.peak is None:
        known.peak = _rehearsed_training(config, plan, placement)
    return known.peak


def training_fits(config: Config, plan: StagePlan, placement: Placement, room: int) -> bool:
    """Whether that peak is at most `room` bytes; where it is not, the rehearsal ends with the first byte beyond."""
    known = _known(config, plan, placement)
    if known.peak is None and (known.more_than is None or known.more_than < room):
        try:
            known.peak = _rehearsed_training(config, plan, placement, room)
        except BudgetError:
            known.more_than = room
    return known.peak is not None and known.peak.bytes <= room


def _rehearsed_training(config: Config, plan: StagePlan, placement: Placement, limit: int | None = None) -> Peak:
    """Raises BudgetError where the peak passes the limit."""
    size, window = config.training.batch_size, plan.window.frames

    def step(meter: Meter) -> None:
        rehearsal = _Rehearsal(plan, config, DEVICE, placement, meter)
        # As in training, loss and accuracy of a step live until those of the next one take their place.
        before = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
        stored = torch.float32 if plan.stage == 1 else STORED[config.cache.dtype].tensor
        frames = torch.zeros(size, window, *plan.frame_shape, dtype=stored, device="meta")
        lengths = np.full(size, window)
        # Padding is masked, and masks take room, in whichever slice it comes.
        lengths[:: placement.micro_batch] = min(window, plan.lengths.min())
        classes = np.zeros(size, dtype=np.int64)
        rehearsal.train(Batch(frames, lengths, classes), Randomness(lambda: np.random.default_rng(0)))
        del before

    meter = rehearse(step, limit)
    return Peak(meter.peak, meter.peak_by_kind)


class _Rehearsal(LoadedStage):
    """Goes through the first slices of a batch and its first passes, and does not go on in smaller slices."""

    def _draws(self, batch: Batch, randomness: Randomness) -> Sequence[Draw]:
        full = replace(batch, lengths=np.full(len(batch.lengths), batch.frames.shape[1]))
        draws = super()._draws(full, randomness)
        samples, frames = len(batch.lengths), int(self.module.out_length(batch.frames.shape[1]))
        most = max(_most_hit(len(draw.rows), samples * frames) for draw in draws)
        in_slice = max(_most_in_a_slice(draw.rows, samples, frames, self.placement.micro_batch) for draw in draws)
        rows = _spread_out(most, min(in_slice, most), samples, frames, self.placement.micro_batch)
        return [replace(cast(Any, draw), rows=rows) for draw in draws[:REHEARSED_PASSES]]

    def _repeat_in_smaller_slices(
        self,
        work: Callable[[microbatch.Batch, Sequence[Draw]], Total],
        draws: Sequence[Draw],
        batch: Batch,
        randomness: Randomness,
    ) -> Total:
        return work(self._encoded(batch, randomness.seed), draws)

    def _run_back(self, pending: Pending, encoded: microbatch.Batch) -> None:
        microbatch.run_back(pending, encoded, self.placement.micro_batch)

    def _optimizer(self, trained: nn.Module, options: TrainingOptions) -> Optimizer:
        if self.placement.optimizer_on_host:
            return _Elsewhere(trained)
        optimizer = super()._optimizer(trained, options)
        if self.plan.optimization:  # which makes its state at the first step: here as much is there as in all others
            for parameter in filter(lambda parameter: parameter.requires_grad, trained.parameters()):
                parameter.grad = torch.zeros_like(parameter)
            try:
                optimizer.step()
            except DataDependentOutputException:
                raise ConfigError(
                    "The optimizer looks at values while it steps, so its memory cannot be rehearsed; set memory.optimizer to "
                    "host."
                ) from None
        return optimizer

    def _samples(self, batch: Batch) -> int:
        return min(len(batch.lengths), REHEARSED_SLICES * self.placement.micro_batch)


class _Elsewhere:
    """What an optimizer on the host leaves to see on the device: the gradients go."""

    def __init__(self, trained: nn.Module) -> None:
        self._trained = trained

    def step(self) -> None:
        self._trained.zero_grad()

    def begin_epoch(self, epoch: int) -> None:
        """The learning rate is the host's."""

    def on_device(self) -> list[torch.Tensor]:
        return []

    def state(self) -> dict[str, State]:
        return {}

    def load(self, state: Mapping[str, State]) -> None:
        """There is nothing to take over."""


def _most_hit(rows: int, frames: int) -> int:
    """More rows than a draw of about `rows` out of `frames` ever has.

    Where n out of N frames are hit by independent draws, a = -ln(1 - n / N) draws fall on each, and n has the variance
    N e^-a (1 - (1 + a) e^-a).
    """
    missed = max(1 - rows / frames, 1e-9)
    spread = math.sqrt(max(frames * missed * (1 - (1 - math.log(missed)) * missed), 0))
    return min(frames, math.ceil(rows + SPREAD * spread))


def _most_in_a_slice(rows: np.ndarray, samples: int, frames: int, micro_batch: int) -> int:
    """More rows than ever fall into one slice, where those of a draw fall as these do."""
    starts = np.arange(0, samples + micro_batch, micro_batch) * frames
    most, size = int(np.diff(np.searchsorted(rows, starts)).max()), micro_batch * frames
    return min(size, math.ceil(most + SPREAD * math.sqrt(most * max(1 - most / size, 0))))


def _spread_out(most: int, in_slice: int, samples: int, frames: int, micro_batch: int) -> np.ndarray:
    """`most` rows, `in_slice` of them in each of the slices that are rehearsed."""
    size = micro_batch * frames
    slices = [start + np.arange(in_slice) * size // in_slice for start in range(0, REHEARSED_SLICES * size, size)]
    first = np.concatenate(slices)[:most]
    behind = min(REHEARSED_SLICES * size, samples * frames)
    others = behind + np.arange(most - len(first)) * (samples * frames - behind) // max(most - len(first), 1)
    return np.concatenate([first[first < samples * frames], others])


@remembered
def caching_peak(config: Config, plan: StagePlan, piece: int) -> int:
    """Predicted bytes of the caching pass of a stage: of a long sample that is streamed, or of short ones with padding."""
    module = plan.build_module(config.training.seed, torch.device("meta"))
    *below, last = module.layers.values()
    if not last.recurrent or module.out_length(piece) <= 2 * REHEARSED_STEPS:
        return _rehearsed_caching(config, plan, piece, len(module.layers))
    # A recurrent layer takes its time for every frame, fake ones too, and the same room: two short pieces give the line
    # that a long one lies on, and the layers below it are rehearsed at full length.
    short = -(-REHEARSED_STEPS * piece // int(module.out_length(piece)))
    first, second = (_rehearsed_caching(config, plan, n * short, len(module.layers)) for n in (1, 2))
    whole = first + math.ceil((second - first) * (piece - short) / short)
    return max(whole, _rehearsed_caching(config, plan, piece, len(below)) if below else 0)


def _rehearsed_caching(config: Config, plan: StagePlan, piece: int, layers: int) -> int:
    """Of the first layers of a stage."""
    cached = STORED[config.cache.dtype].tensor
    stored = torch.float32 if plan.stage == 1 else cached

    def read(samples: int, frames: int) -> torch.Tensor:
        return on_device(torch.zeros(samples, frames, *plan.frame_shape, dtype=stored, device="meta"), DEVICE)

    def build() -> Module:
        module = plan.build_module(config.training.seed, DEVICE).eval()
        return Module({int(name): layer for name, layer in list(module.layers.items())[:layers]})

    def stream(_: Meter) -> None:
        module, states = build(), None
        with torch.no_grad(), autocast(DEVICE, config.training.precision):
            # How much input a layer carries over depends on where a piece ends within its stride: every place once.
            pieces = 2 + max(layer.stride for layer in module.layers.values())
            for last in [False] * pieces + [True]:
                frames = read(1, piece)
                outputs, states = module.push(frames, states, last)
                del frames
                outputs.to(cached).isfinite().all()
                del outputs

    def pad(_: Meter) -> None:
        module = build()
        lengths = np.array([piece - piece // 2, max(piece // 2 - 1, 0)])
        if module.out_length(lengths[0]) < 1:
            return  # no two samples are that short
        with torch.no_grad(), autocast(DEVICE, config.training.precision):
            outputs = module(read(2, int(lengths[0])), lengths)[1]
            outputs.to(cached).isfinite().all()

    return max(rehearse(stream).peak + _carried_more(plan, layers), rehearse(pad).peak)


def _carried_more(plan: StagePlan, layers: int) -> int:
    """Bytes by which what layers carry over may exceed what they carried in the rehearsal.

    With strides above each other the places where pieces end repeat only after their product. A layer then has at most
    as many frames more as its stride, in its input and in the copy that is joined to it, and puts one more out.
    """
    module = plan.build_module(0, torch.device("meta"))
    built = list(module.layers.values())[:layers]
    if sum(layer.stride > 1 for layer in built) < 2:
        return 0
    x, more = torch.empty(1, plan.window.frames, *plan.frame_shape, device="meta"), 0
    for layer in built:
        before = x[0, 0].numel()
        x = layer(x)
        more += 4 * (2 * layer.stride * before + x[0, 0].numel())
    return more


def _piece_peak(config: Config, plan: StagePlan, below: Below, piece: int) -> int:
    """Of one piece of the caching pass, its recomputing included: one long window, or short ones side by side."""
    recomputing = (recomputing_peak(config, below, n, -(-piece // n)) for n in (1, config.training.batch_size))
    return max(caching_peak(config, plan, piece), *recomputing)


def recomputing_peak(config: Config, below: Below, windows: int, frames: int) -> int:
    """Predicted bytes of passing windows up through the stages below, each alone on the device; 0 where there are none.

    windows: on the device at once; frames: of the outcome.
    """
    peak = 0
    firsts, stops = 0, frames
    for plan in reversed(below):
        firsts, stops = plan.build_module(0, torch.device("meta")).inputs_of(firsts, stops)
        peak = max(peak, _passing_peak(config, plan, windows, stops - firsts))
    return peak


@remembered
def _passing_peak(config: Config, plan: StagePlan, windows: int, frames: int) -> int:
    """Of windows of `frames` input frames through one stage, at the beginning of their samples, where they are masked."""
    rounded = STORED[config.cache.dtype].tensor
    stored = torch.float32 if plan.stage == 1 else rounded

    def work(_: Meter) -> None:
        module = plan.build_module(config.training.seed, DEVICE).eval()
        firsts, lengths = np.full(windows, -module.inputs_of(0, 1)[1]), np.full(windows, 2 * frames)
        with torch.no_grad(), autocast(DEVICE, config.training.precision):
            x = on_device(torch.zeros(windows, frames, *plan.frame_shape, dtype=stored, device="meta"), DEVICE)
            outputs = module.window(x, firsts, lengths)[0]
            del x
            outputs.to(rounded).isfinite().all()

    return rehearse(work).peak


def _longest_that_fits(longest: int, shortest: int, fits: Callable[[int], bool]) -> int | None:
    """The longest piece by halves, or None where not even the shortest fits."""
    piece = longest
    while not fits(piece):
        if piece == shortest:
            return None
        piece = max(piece // 2, shortest)
    return piece


def _why(config: Config, plan: StagePlan, chosen: Placement, cheapest_one: Placement) -> str:
    needed, found = training_peak(config, plan, cheapest_one).bytes, behaviour(plan)
    why = f"the cheapest way ({cheapest_one}) would take {needed / 1e6:.1f} MB"
    if found.why_whole:
        why += f"; {found.why_whole}, so the batch cannot be sliced"
    if not chosen.whole and found.draws:
        why += "; what the module draws at random, as in dropout, differs from what a whole batch would draw"
    return why


def _too_small(config: Config, plan: StagePlan, device: torch.device, below: Below) -> BudgetError:
    budget, needed = config.memory.gpu_mem, smallest_budget(config, plan, device, below)
    last = smallest_layout(config, plan, below).placement
    whole = behaviour(plan).why_whole
    why = f" ({whole}, so the batch cannot be sliced)" if whole else ""
    finer = ", or cut into more --stages" if len(plan.layers) > 1 else ""
    window = "data.window" if plan.window.columns == 1 else "data.crop"
    smaller = f"--batch-size, {window} or net.width" if whole else f"{window} or net.width"
    return BudgetError(
        f"--gpu-mem {(budget or 0) / 1e6:g} MB is too small: stage {plan.stage} needs {math.ceil(needed / 1e4) / 100:g} MB "
        f"even as {last}{why}. Give at least that, or lower {smaller}{finer}."
    )

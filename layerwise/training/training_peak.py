"""Predicts what a step of a stage takes at its peak.

A prediction is not a model of the code but the code itself: its very steps are rehearsed on fake tensors. Of many like
slices only the first are rehearsed, for the others need the same room."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from layerwise.config import Config
from layerwise.data.batches import Batch
from layerwise.errors import BudgetError, ConfigError
from layerwise.memory import microbatch
from layerwise.memory.meter import REHEARSED_ON, Kind, in_host_memory, rehearsal
from layerwise.memory.microbatch import Pending, Total
from layerwise.memory.plan import MemoryPlan
from layerwise.memory.recurrence import FoldedFrames
from layerwise.memory.reserved import Allocations, Segments
from layerwise.nets.module import Contexts, Module
from layerwise.nets.network import memoised_per
from layerwise.objectives.protocol import Draw, Group, ObjectiveModule
from layerwise.training.context import RunContext
from layerwise.training.optimizer import HostOptimizer, Optimizer
from layerwise.training.rehearsed_input import resident_rows, stored_input
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import StageTrainer, StepRandomness

REHEARSED_PARTS = 2

SPREAD = 5
"""Standard deviations by which the rows of a draw may exceed those of the rehearsed one."""


@dataclass(frozen=True, slots=True)
class Peak:
    """A predicted peak in bytes, and what it is made of."""

    bytes: int
    by_kind: dict[Kind, int]
    allocations: Allocations = field(default_factory=Allocations, compare=False, repr=False)
    """Of the step that takes it."""

    def reserved(self, reserved: int) -> "Peak":
        """The same where so many bytes are reserved; what tensors do not request of them counts as activations."""
        by_kind = self.by_kind | {"activations": self.by_kind["activations"] + reserved - self.bytes}
        return replace(self, bytes=reserved, by_kind=by_kind)


@dataclass(slots=True)
class _Rehearsal:
    """What is known of a part of a step under one plan."""

    peak: Peak | None = None
    more_than: int | None = None
    """Bytes at which a rehearsal was broken off, where none has reached its end."""


_Phase = Literal["step", "loss", "replay"]


@memoised_per(StageSpec)
def _rehearsal(config: Config, spec: StageSpec, phase: _Phase, plan: MemoryPlan) -> _Rehearsal:
    return _Rehearsal()


def _phases(plan: MemoryPlan) -> list[tuple[_Phase, MemoryPlan]]:
    """What is rehearsed by itself, each with the parts of the plan that matter to it.

    Where module and representations wait on the host, module and loss never are on the device together. The first pass
    through the module takes less than the second one, which comes with gradients.
    """
    if not (plan.optimizer_on_host and plan.parts):
        return [("step", plan)]
    of_loss = replace(plan, micro_batch=plan.batch_size, recompute=False, gradients_at_once=False)
    return [("loss", of_loss), ("replay", replace(plan, parts=1, predictors=0, loss_room=0))]


def training_peak(config: Config, spec: StageSpec, plan: MemoryPlan, segments: Segments | None = None) -> Peak:
    """Predicted peak of the training pass of a stage, at full windows; segments: as in `caching_peak`."""
    peaks = []
    for phase, part_of_plan in _phases(plan):
        known = _rehearsal(config, spec, phase, part_of_plan)
        if known.peak is None:
            known.peak = _rehearsed(config, spec, phase, part_of_plan)
        peaks.append(known.peak)
    if segments is not None:
        peaks = [peak.reserved(peak.allocations.least(segments)) for peak in peaks]
    return max(peaks, key=lambda peak: peak.bytes)


def training_fits(
    config: Config, spec: StageSpec, plan: MemoryPlan, room: int, segments: Segments | None = None
) -> bool:
    """Whether that peak is at most `room` bytes; where it is not, the rehearsal ends with the first byte beyond."""
    for phase, part_of_plan in _phases(plan):
        known = _rehearsal(config, spec, phase, part_of_plan)
        if known.peak is None and (known.more_than is None or known.more_than < room):
            try:
                known.peak = _rehearsed(config, spec, phase, part_of_plan, room)
            except BudgetError:
                known.more_than = room
        if known.peak is None or known.peak.bytes > room:
            return False
        if segments is not None and not known.peak.allocations.fit(room, segments):
            return False
    return True


def _rehearsed(config: Config, spec: StageSpec, phase: _Phase, plan: MemoryPlan, limit: int | None = None) -> Peak:
    """Raises BudgetError where the peak passes the limit."""
    size, window = config.training.batch_size, spec.window.frames
    with rehearsal(limit) as meter:
        trainer = _RehearsedTrainer(spec, config, plan, RunContext(REHEARSED_ON, meter))
        rows = resident_rows(config, spec, plan.resident)
        # As in training, loss and accuracy of a step live until those of the next one take their place.
        before = _score()
        meter.allocations.begin_step()
        frames = stored_input(config, spec, size, window, plan.resident)
        lengths = np.full(size, window)
        # Padding is masked, and masks take room, in whichever slice it comes.
        lengths[:: plan.micro_batch] = min(window, spec.lengths.min())
        batch = Batch(frames, lengths, np.zeros(size, dtype=np.int64), rows=rows)
        trainer.rehearse(phase, batch)
        del before
    return Peak(meter.peak, meter.peak_by_kind, meter.allocations)


def _score() -> Total:
    return Total(torch.zeros((), device=REHEARSED_ON), torch.zeros((), device=REHEARSED_ON))


class _RehearsedTrainer(StageTrainer):
    """Goes through the first slices and parts of a batch. Where they do not fit, it does not try smaller ones."""

    def rehearse(self, phase: _Phase, batch: Batch) -> None:
        """A step, or a part of it."""
        randomness = StepRandomness(lambda: np.random.default_rng(0))
        if phase == "step":
            coming = None
            if self.memory_plan.ahead:
                drawn = self._draw(batch, randomness)
                batch = replace(batch, drawn=drawn)
                if drawn.packed is not None:  # an objective of the user's may bring what it draws by itself
                    coming = torch.empty(drawn.packed.buffer.shape, dtype=torch.uint8, device=REHEARSED_ON)
            self.train(batch, randomness)
            del coming
            return
        self.module.train()
        draws, sliced = self._draws(batch, randomness), self._sliced(batch, randomness.seed)
        with in_host_memory():
            channels = [self.spec.output_shape[0]]
            if not self.spec.shapes.targets_are_outputs:
                channels.insert(0, self.spec.target_channels)
            vectors = [torch.empty(len(self._most_rows), count, dtype=torch.float32) for count in channels]
        if phase == "loss":
            encoded = microbatch.Representations(self._most_rows, tuple(vectors), None)
            with contextlib.closing(self._losses()) as losses:
                microbatch.loss_gradients(sliced, encoded, losses, draws)
        else:
            pending = Pending(self._most_rows, _score(), vectors, graph=None, on_host=True)
            with self.module_on_device():
                self._replay(pending, sliced)

    def _build(self) -> tuple[Module, ObjectiveModule]:
        """Without values, on the host too."""
        with in_host_memory() if self.memory_plan.optimizer_on_host else contextlib.nullcontext():
            seed = self.config.training.seed
            return self.spec.build_module(seed, REHEARSED_ON), self.spec.build_objective(self.config, REHEARSED_ON)

    def _checkpoint_contexts(self) -> Contexts:
        """Recurrent layers are folded in the backward pass as they were in the forward pass: torch forgets its modes there."""
        return contextlib.nullcontext(), FoldedFrames(lambda: self.context.meter.live)

    def _draws(self, batch: Batch, randomness: StepRandomness) -> Sequence[Draw]:
        full = replace(batch, lengths=np.full(len(batch.lengths), batch.frames.shape[1]))
        draws = super()._draws(full, randomness)
        self._most_rows = self._most(batch, microbatch.all_rows(draws))
        most = max((self._most(batch, draw.rows) for draw in draws), key=len)
        return [replace(cast(Any, draw), rows=most) for draw in draws[:REHEARSED_PARTS]]

    def _rows(self, draws: Sequence[Draw]) -> np.ndarray:
        return self._most_rows

    def _most(self, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """At least as many rows as ever, and in the slice that is rehearsed as many as ever fall into one."""
        samples, frames = len(batch.lengths), self.spec.vectors(batch.frames.shape[1])
        of_slice = min(self.memory_plan.micro_batch, samples) * frames
        most = _most_hit(len(rows), samples * frames)
        in_slice = min(_most_in_a_slice(len(rows), samples * frames, of_slice), most)
        return _spread_out(most, in_slice, samples * frames, of_slice)

    def _visits(self, stacked: torch.Tensor) -> Iterator[Group]:
        return itertools.islice(super()._visits(stacked), REHEARSED_PARTS)

    def _shrink(self, reason: str) -> None:
        raise BudgetError(reason)

    def _run_back(self, pending: Pending, batch: microbatch.SlicedBatch) -> None:
        self._replay(pending, batch)

    def _replay(self, pending: Pending, batch: microbatch.SlicedBatch) -> None:
        """Of the second slice, where there are several: it adds to the gradients of the first, like all that follow."""
        if self.memory_plan.micro_batch < self.config.training.batch_size and not self.memory_plan.gradients_at_once:
            for parameter in self.module.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            self.context.meter.label("gradients", (parameter.grad for parameter in self.module.parameters()))
        super()._replay(pending, replace(batch, samples=min(batch.samples, batch.micro_batch)))

    def _optimizer(self, trained: nn.Module) -> Optimizer:
        if self.memory_plan.optimizer_on_host:
            return _OptimizerSeenFromDevice(trained)
        optimizer = super()._optimizer(trained)
        if self.spec.optimization:
            # It makes its state at the first step; the rehearsed step is to be like all later ones.
            for parameter in trained.parameters():
                if parameter.requires_grad:
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
        """Two slices: what is encoded of several is kept otherwise than what is encoded at once."""
        return min(len(batch.lengths), 2 * self.memory_plan.micro_batch)


class _OptimizerSeenFromDevice(HostOptimizer):
    """Of a step on the host, the device sees nothing."""

    def __init__(self, trained: nn.Module) -> None:
        self._trained = trained

    def step(self) -> None:
        self._trained.zero_grad()


def _most_hit(rows: int, frames: int) -> int:
    """More rows than a draw of about `rows` out of `frames` ever has.

    Where n out of N frames are hit by independent draws, a = -ln(1 - n / N) draws fall on each, and n has the variance
    N e^-a (1 - (1 + a) e^-a).
    """
    missed = max(1 - rows / frames, 1e-9)
    spread = math.sqrt(max(frames * missed * (1 - (1 - math.log(missed)) * missed), 0))
    return min(frames, math.ceil(rows + SPREAD * spread))


def _most_in_a_slice(rows: int, frames: int, of_slice: int) -> int:
    """More rows than ever fall into a slice of so many frames, where `rows` out of `frames` are hit."""
    mean = rows * of_slice / frames
    return min(of_slice, math.ceil(mean + SPREAD * math.sqrt(mean * max(1 - mean / of_slice, 0))))


def _spread_out(most: int, in_slice: int, frames: int, in_first: int) -> np.ndarray:
    """`most` rows out of so many frames, `in_slice` of them among the first `in_first`, which are a slice."""
    first = np.arange(in_slice) * in_first // in_slice
    others = in_first + np.arange(most - in_slice) * (frames - in_first) // max(most - in_slice, 1)
    return np.concatenate([first, others])

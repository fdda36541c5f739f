"""What an optimizer step of a stage costs: floating point operations, and bytes that go between host and device.

Operations are counted on tensors without values. What moves follows from the memory plan; `HostMemory.moved` counts the same in
a run.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layerwise.cache.dtypes import STORED
from layerwise.config import Config
from layerwise.memory.flops import FlopCounter
from layerwise.memory.meter import REHEARSED_ON, fake_tensors
from layerwise.memory.plan import MemoryPlan
from layerwise.nets.network import memoised_per
from layerwise.objectives.protocol import Draw, Streamed
from layerwise.training.spec import StageSpec, batch_effects

COUNTED_STEPS = 4
"""Frames at which a recurrent layer is counted; each frame costs the same."""

COUNTED_SAMPLES = 2
"""Batch normalisation takes no single one."""

TIME_OF_SLICE = 24
"""Targets whose loss takes as long as what a slice of them takes on top."""

TIME_OF_GROUP = 0.01
"""What a group of predictors takes on top, as a part of the loss. Both were measured at width 512, with 7 to 140 targets a
slice and 1 to 12 groups."""

UNLIMITED = 2**62


@dataclass(frozen=True, slots=True)
class StageWork:
    """Of one stage. FLOPs of one sample and of the loss of a batch, multiplications and additions counted each; bytes."""

    forward: int
    recomputed: int
    """Forward, of the layers that activation checkpointing runs again: all but the last."""
    backward: int
    loss: int
    windows: int
    """Frames of a batch."""
    input: int
    """Of a batch as it is read."""
    parameters: int
    """Of the module."""
    gradients: int
    """Of those of its parameters that are trained."""
    buffers: int
    changed: int
    """Of the parameters that a forward pass may change, as it does buffers."""
    predictors: int
    """Of the objective's parameters and buffers."""
    row: int
    """Of the vectors that are scored at one row."""
    stacked: int
    """Predictors that can be on the device some at a time; 0 where all must be."""
    targets_at_once: Callable[[int, int], int] | None
    """Of a loss that is worked out in slices: see `Streamed`."""

    def flops(self, plan: MemoryPlan) -> int:
        """Of a step."""
        of_sample = (1 if plan.whole else 2) * self.forward + plan.recompute * self.recomputed + self.backward
        return plan.batch_size * of_sample + self.loss

    def least_bytes(self, plan: MemoryPlan, rows: int) -> int:
        """What a step cannot take less than on the device: a bound that needs no rehearsal. rows: that are scored."""
        if not plan.optimizer_on_host:
            return self.parameters + 2 * self.gradients + 3 * self.predictors
        share = plan.predictors / self.stacked if plan.predictors else 1
        of_loss = round(2 * share * self.predictors)
        return max(self.parameters, of_loss) if plan.parts else self.parameters + of_loss + 2 * self.row * rows

    def lost_in_slices(self, plan: MemoryPlan) -> int:
        """Operations that the device could do in the time which slices of the loss take on top."""
        if self.targets_at_once is None:
            return 0
        at_once = plan.predictors or self.stacked
        targets, groups = self.targets_at_once(plan.loss_room, at_once), -(-self.stacked // at_once)
        return round(self.loss * (TIME_OF_SLICE / targets + TIME_OF_GROUP * groups))

    def moved(self, plan: MemoryPlan, rows: int, rows_of_parts: int) -> int:
        """Bytes of a step, both ways. rows: that are scored; rows_of_parts: summed over the parts of the loss."""
        total = (8 * self.windows if plan.resident else self.input) * (1 if plan.whole else 2)
        if plan.optimizer_on_host:
            slices = -(-plan.batch_size // plan.micro_batch) if plan.gradients_at_once else 1
            visits = 2 if plan.parts else 1
            total += (
                visits * (self.parameters + 2 * self.buffers + self.changed)
                + slices * self.gradients
                + 2 * self.predictors
            )
        if plan.gradients_wait:
            total += 2 * self.row * rows
        if plan.parts:
            groups = -(-self.stacked // plan.predictors) if plan.predictors and plan.parts > 1 else 1
            total += self.row * (2 * rows + 2 * groups * rows_of_parts)
        return total


@memoised_per(StageSpec)
def step_cost(config: Config, spec: StageSpec, plan: MemoryPlan, flops_per_byte: float) -> tuple[float, ...]:
    """What plans are ordered by: the predicted time of a step, in operations; of the same time, the plan in fewer pieces."""
    pieces = plan.batch_size / plan.micro_batch, plan.parts, plan.predictors and 1 / plan.predictors
    operations = step_operations(config, spec, plan, flops_per_byte)
    return operations, *pieces, plan.recompute, plan.gradients_wait, plan.gradients_at_once


def step_operations(config: Config, spec: StageSpec, plan: MemoryPlan, flops_per_byte: float) -> float:
    """Operations that the device could do in the predicted time of a step, in which nothing is done at the same time."""
    lost, moved = stage_work(config, spec).lost_in_slices(plan), step_moved(config, spec, plan)
    return step_flops(config, spec, plan) + lost + flops_per_byte * moved


def step_least_bytes(config: Config, spec: StageSpec, plan: MemoryPlan) -> int:
    """What a step cannot take less than on the device."""
    return stage_work(config, spec).least_bytes(plan, scored_rows(config, spec, 1))


def step_flops(config: Config, spec: StageSpec, plan: MemoryPlan) -> int:
    """Floating point operations of an optimizer step under a plan."""
    return stage_work(config, spec).flops(plan)


def step_moved(config: Config, spec: StageSpec, plan: MemoryPlan) -> int:
    """Bytes that a step moves between host and device under a plan, both ways."""
    rows, of_parts = (scored_rows(config, spec, parts) for parts in (1, max(plan.parts, 1)))
    return stage_work(config, spec).moved(plan, rows, of_parts)


def waiting_bytes(config: Config, spec: StageSpec, plan: MemoryPlan) -> int:
    """Most that waits on the host during a step: representations, their gradients, and the part that is on its way.

    Where the representations stay on the device, their gradients may wait alone.
    """
    rows, of_parts = (scored_rows(config, spec, parts) for parts in (1, max(plan.parts, 1)))
    held = 2 * rows + of_parts // plan.parts if plan.parts else plan.gradients_wait * rows
    return stage_work(config, spec).row * held


@memoised_per(StageSpec)
def scored_rows(config: Config, spec: StageSpec, parts: int) -> int:
    """Rows of a full batch that the objective scores, summed over the parts of the loss."""
    return sum(len(draw.rows) for draw in _draws(config, spec, parts))


@memoised_per(StageSpec)
def stage_work(config: Config, spec: StageSpec) -> StageWork:
    """Of full windows. Counts on tensors without values."""
    module, size = spec.shapes, config.training.batch_size
    objective = spec.build_objective(config, torch.device("meta"))
    stored = torch.float32 if spec.stage == 1 else STORED[config.cache.dtype].tensor
    forwards, backward = _module_flops(spec)
    return StageWork(
        forward=sum(forwards),
        recomputed=sum(forwards[:-1]),
        backward=backward,
        loss=_loss_flops(config, spec),
        windows=size * spec.window.frames,
        input=size * spec.window.frames * math.prod(spec.frame_shape) * stored.itemsize,
        parameters=_bytes(module.parameters()),
        gradients=_bytes(parameter for parameter in module.parameters() if parameter.requires_grad),
        buffers=_bytes(module.buffers()),
        changed=_bytes(module.parameters()) if batch_effects(spec).changes_parameters else 0,
        predictors=_bytes((*objective.parameters(), *objective.buffers())),
        row=4 * (spec.output_shape[0] + (not module.targets_are_outputs) * spec.target_channels),
        stacked=len(objective.stacked) if isinstance(objective, Streamed) else 0,
        targets_at_once=objective.targets_at_once if isinstance(objective, Streamed) else None,
    )


def _module_flops(spec: StageSpec) -> tuple[list[int], int]:
    """Of a sample: of each layer's forward pass, and of the backward pass."""
    forwards, backward = [], 0
    frames, shape = spec.window.frames, spec.frame_shape
    with fake_tensors():
        module = spec.build_module(0, REHEARSED_ON)
        for number, layer in enumerate(module.layers.values()):
            counted = min(frames, COUNTED_STEPS) if layer.recurrent else frames
            x = torch.zeros(COUNTED_SAMPLES, counted, *shape, requires_grad=number > 0)
            with FlopCounter() as of_forward:
                outputs = layer(x)
            with FlopCounter() as of_backward:
                if outputs.requires_grad:
                    outputs.backward(torch.zeros_like(outputs))
            share = frames / counted / COUNTED_SAMPLES
            forwards.append(round(share * of_forward.total))
            backward += round(share * of_backward.total)
            frames, shape = int(layer.out_length(frames)), tuple(outputs.shape[2:])
    return forwards, backward


def _loss_flops(config: Config, spec: StageSpec) -> int:
    """Of the loss of a batch and its gradients."""
    (draw,) = _draws(config, spec, parts=1)
    with torch.device("meta"), FlopCounter() as counter:
        objective = spec.build_objective(config, torch.device("meta"))
        contexts = torch.zeros(len(draw.rows), spec.output_shape[0], requires_grad=True)
        targets = torch.zeros(len(draw.rows), spec.target_channels, requires_grad=True)
        objective(targets, contexts, draw, UNLIMITED).loss.backward()
    return counter.total


def _draws(config: Config, spec: StageSpec, parts: int) -> Sequence[Draw]:
    """Of a batch of full windows."""
    size, frames = config.training.batch_size, spec.vectors(spec.window.frames)
    classes, rng = np.zeros(size, dtype=np.int64), np.random.default_rng(0)
    objective = spec.build_objective(config, torch.device("meta"))
    return objective.draw(np.full(size, frames), frames, spec.vector_columns, rng, parts, classes)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

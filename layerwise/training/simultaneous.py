"""All modules of a network at once, each trained by its own objective alone: the schedule of Greedy InfoMax as published.

A batch goes up module by module. Each one's outputs are worked out first, then it takes a step of its own; no gradient
passes from one to the next. All of them are on the device the whole time, which training one after another saves; this
is what that is compared with.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from layerwise.config import Config
from layerwise.data.batches import Batch
from layerwise.memory.device import autocast, on_device
from layerwise.memory.meter import metered
from layerwise.memory.microbatch import Total
from layerwise.memory.plan import MemoryPlan
from layerwise.nets.module import Module
from layerwise.training.context import RunContext
from layerwise.training.loader import pinned
from layerwise.training.optimizer import Optimizer
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import StageTrainer, StepRandomness

Step = Callable[[StageTrainer, Batch, StepRandomness], Total]


class SimultaneousTrainer:
    """Trains all parts of a stage at once; the training loop and checkpoints use it like a StageTrainer."""

    shrunk = False

    def __init__(self, spec: StageSpec, config: Config, memory_plan: MemoryPlan, context: RunContext) -> None:
        self.spec, self.config, self.memory_plan, self.context = spec, config, memory_plan, context
        self._parts = [StageTrainer(part, config, memory_plan, context) for part in spec.parts]
        self.module = Module({int(i): layer for part in self._parts for i, layer in part.module.layers.items()})
        self.objective = nn.ModuleDict({str(part.spec.stage): part.objective for part in self._parts})
        self.scale = self._parts[0].scale
        for part in self._parts:
            part.scale = self.scale

    @property
    def modules(self) -> list[Module]:
        """From the lowest to the uppermost."""
        return [part.module for part in self._parts]

    def optimizers(self) -> list[tuple[str, Optimizer]]:
        """Each with what a checkpoint writes before the names of its parameters."""
        modules = [("module/", part.optimizer) for part in self._parts]
        return modules + [(f"objective/{part.spec.stage}.", part.predictor_optimizer) for part in self._parts]

    def prepared(self, batch: Batch, randomness: StepRandomness) -> Batch:
        """As of a StageTrainer; but each part draws when it is its turn."""
        return pinned(batch, self.context.device)

    def send_for(self, batch: Batch) -> None:
        """Nothing: its parts share the device as it is."""

    def forget_coming(self) -> None:
        """There is none."""

    def train(self, batch: Batch, randomness: StepRandomness) -> Total:
        """One step of every module. Means over the modules."""
        return self._up(batch, randomness, StageTrainer.train)

    def evaluate(self, batch: Batch, randomness: StepRandomness) -> Total:
        """The scores without a step. Means over the modules."""
        return self._up(batch, randomness, StageTrainer.evaluate)

    def vectors(self, batch: Batch, randomness: StepRandomness) -> torch.Tensor:
        """Those of the uppermost module."""
        for part in self._parts[:-1]:
            batch = self._outputs(part, batch)
        return self._parts[-1].vectors(batch, _of_part(randomness, len(self._parts) - 1))

    @contextlib.contextmanager
    def offloaded(self) -> Iterator[None]:
        """All of them start from the data, so there is never anything to recompute that needs their room."""
        yield

    def _up(self, batch: Batch, randomness: StepRandomness, step: Step) -> Total:
        scores = []
        for number, part in enumerate(self._parts):
            above = self._outputs(part, batch) if number + 1 < len(self._parts) else None
            scores.append(step(part, batch, _of_part(randomness, number)))
            if above is not None:
                batch = above
        losses = torch.stack([score.loss for score in scores])
        return Total(losses.mean(), torch.stack([score.accuracy for score in scores]).mean())

    def _outputs(self, part: StageTrainer, batch: Batch) -> Batch:
        """The input of the next part, on the device."""
        device, meter = self.context.device, self.context.meter
        look = meter.should_meter(f"outputs, stage {part.spec.stage}", batch.frames.shape[1])
        precision = self.config.training.precision
        with torch.no_grad(), metered(look), part.module_on_device(), autocast(device, precision):
            part.module.eval()
            frames = on_device(batch.frames, device)
            outputs = part.module(frames, batch.lengths)[1]
        return replace(batch, frames=outputs, lengths=part.module.out_length(batch.lengths))


def _of_part(randomness: StepRandomness, number: int) -> StepRandomness:
    def negatives() -> np.random.Generator:
        return randomness.negatives().spawn(number + 1)[number]

    return StepRandomness(negatives, randomness.seed + number)


AnyTrainer = StageTrainer | SimultaneousTrainer
"""What the training loop steps and a checkpoint saves."""

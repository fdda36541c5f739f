"""A stage on the device: module, objective and optimizers, and one step on a batch under the budget.

A step that runs out of memory is repeated in smaller slices with the same random numbers; the result does not change.
Everything random is seeded by the caller, so nothing has to be stored for that.

Several ranks take the same step, each with its share of the batch (see memory.microbatch). Between ranks slices do not become
smaller before the predictors have stepped: the other ranks would wait for something else.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from layerwise.config import Config
from layerwise.data.batches import Batch
from layerwise.errors import BudgetError
from layerwise.memory import microbatch
from layerwise.memory.device import autocast, offloaded, on_device, pack_recurrent_weights, release, why_out_of_memory
from layerwise.memory.meter import metered
from layerwise.memory.microbatch import Pending, Total
from layerwise.memory.plan import MemoryPlan
from layerwise.objectives.protocol import Draw
from layerwise.training.context import RunContext
from layerwise.training.optimizer import HostOptimizer, LossScale, Optimizer, adam
from layerwise.training.spec import StageSpec, batch_effects


class NoSmallerSlices(BudgetError):
    """Out of memory, and the slices cannot be made smaller."""


@dataclass(frozen=True, slots=True)
class StepRandomness:
    """What a step draws: negatives from a generator that is made anew at each attempt, and what the module draws."""

    negatives: Callable[[], np.random.Generator]
    seed: int = 0


class StageTrainer:
    """Module, objective and their optimizers on the device, and its memory plan, which may become smaller."""

    def __init__(self, spec: StageSpec, config: Config, memory_plan: MemoryPlan, context: RunContext) -> None:
        self.spec, self.config, self.memory_plan, self.context = spec, config, memory_plan, context
        self.effects = batch_effects(spec)
        self.module = spec.build_module(config.training.seed, context.device)
        self.objective = spec.build_objective(config, context.device)
        self.optimizer = self._optimizer(self.module)
        self.predictor_optimizer = self._optimizer(self.objective)
        self.shrunk = False
        """Whether a step ran out of memory, so that the plan is smaller than it was."""
        self.scale = LossScale.of(config.training.precision)
        self._label()
        self._label_gradients()

    def go_on_shrunk(self, micro_batch: int, passes: int) -> None:
        """Takes slices at least as small as an earlier start had to: with these it got where it stopped."""
        micro_batch, passes = min(micro_batch, self.memory_plan.micro_batch), max(passes, self.memory_plan.passes)
        self.memory_plan, self.shrunk = replace(self.memory_plan, micro_batch=micro_batch, passes=passes), True

    def optimizers(self) -> list[tuple[str, Optimizer]]:
        """Each with what a checkpoint writes before the names of its parameters."""
        return [("module/", self.optimizer), ("objective/", self.predictor_optimizer)]

    def train(self, batch: Batch, randomness: StepRandomness) -> Total:
        """One optimizer step; leaves no gradients behind. Raises BudgetError where not even the smallest slices fit."""
        self.module.train()
        draws = self._draws(batch, randomness)
        with metered(self._should_meter("training", batch, draws)):
            score = self._repeat_in_smaller_slices(self._attempt, draws, batch, randomness)
            self._add_gradients()
            if self.scale.unscale(self.module.parameters()):
                self.optimizer.step()
            self._forget_gradients()
        return self._agreed(score)

    def evaluate(self, batch: Batch, randomness: StepRandomness) -> Total:
        """The score of a batch, without a step."""
        self.module.eval()
        draws = self._draws(batch, randomness)
        with metered(self._should_meter("held-out", batch, draws)):
            return self._agreed(self._repeat_in_smaller_slices(self._score, draws, batch, randomness))

    @contextlib.contextmanager
    def offloaded(self) -> Iterator[None]:
        """Between two steps: the device is free of the stage inside the block, and holds the same bits again behind it."""
        tensors = [*self.module.parameters(), *self.module.buffers(), *self.objective.parameters()]
        states = [*self.optimizer.on_device(), *self.predictor_optimizer.on_device()]
        with offloaded([*tensors, *states], self.context.device):
            yield
        pack_recurrent_weights(self.module)
        self._label()

    def _score(self, encoded: microbatch.SlicedBatch, draws: Sequence[Draw]) -> Total:
        return microbatch.score(encoded, self._loss, draws, self.memory_plan.micro_batch)

    def _attempt(self, encoded: microbatch.SlicedBatch, draws: Sequence[Draw]) -> Total:
        """All gradients of the module in place, and the predictors' step taken."""
        if len(draws) > 1 or self.effects.uses_randomness:
            scores = []
            for draw in draws:
                pending = self._loss_gradients(encoded, draw)
                microbatch.run_back(pending, encoded, self.memory_plan.micro_batch)
                scores.append(pending.score)
                del pending  # its gradients would stay through the next pass
            self._step_predictors()
            return microbatch.total(scores)
        pending = self._loss_gradients(encoded, draws[0])
        # The predictors step at once and let go of their gradients: the module's come into their room.
        self._step_predictors()
        self._run_back(pending, encoded)
        return pending.score

    def _step_predictors(self) -> None:
        """Their gradients are the same on all ranks, but for how each device rounds."""
        self.context.ranks.broadcast(
            parameter.grad for parameter in self.objective.parameters() if parameter.grad is not None
        )
        self.predictor_optimizer.step()

    def _add_gradients(self) -> None:
        """Each rank has the part of the module's gradients that comes through its own samples."""
        if self.context.ranks.count == 1:
            return
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # none of this rank's samples was scored
                parameter.grad = torch.zeros_like(parameter)
        self.context.ranks.all_reduce(parameter.grad for parameter in trained if parameter.grad is not None)

    def _agreed(self, score: Total) -> Total:
        """The same to the bit on all ranks."""
        self.context.ranks.broadcast([score.loss, score.accuracy])
        return score

    def _loss_gradients(self, encoded: microbatch.SlicedBatch, draw: Draw) -> Pending:
        pending = microbatch.loss_gradients(encoded, self._loss, draw, self.memory_plan.micro_batch, self.scale.factor)
        self.context.meter.label("gradients", (parameter.grad for parameter in self.objective.parameters()))
        return pending

    def _run_back(self, pending: Pending, encoded: microbatch.SlicedBatch) -> None:
        """Cannot be left half done once the predictors have stepped, so it sees to its own memory."""
        while True:
            try:
                microbatch.run_back(pending, encoded, self.memory_plan.micro_batch)
                return
            except (BudgetError, RuntimeError) as error:
                reason = why_out_of_memory(error)
            self.module.zero_grad()
            if self.memory_plan.micro_batch > 1 or self.effects.why_unsliceable:
                self._shrink(reason)
            elif not pending.on_host:
                pending.move_to_host()
                release(self.context.device)
            else:
                raise NoSmallerSlices(reason)

    def _repeat_in_smaller_slices(
        self,
        work: Callable[[microbatch.SlicedBatch, Sequence[Draw]], Total],
        draws: Sequence[Draw],
        batch: Batch,
        randomness: StepRandomness,
    ) -> Total:
        encoded = self._encoded(batch, randomness.seed)
        while True:
            try:
                return work(encoded, draws)
            except NoSmallerSlices:
                raise
            except (BudgetError, RuntimeError) as error:
                reason = why_out_of_memory(error)
            # Outside of the handler: while the error is known, so are the tensors of the attempt.
            self._forget_gradients()
            if self.context.ranks.count > 1:
                raise NoSmallerSlices(
                    f"{reason} Several processes share the batches and cannot make their slices smaller on the way: give "
                    f"--set memory.micro_batch={max(self._samples_at_once(batch) // 2, 1)}."
                )
            self._shrink(reason)
            draws = self._draws(batch, randomness)

    def _shrink(self, reason: str) -> None:
        if self.effects.why_unsliceable:
            raise NoSmallerSlices(f"{reason} {self.effects.why_unsliceable}, so the batch cannot be sliced.")
        smaller = self.memory_plan.smaller()
        if smaller is None:
            raise NoSmallerSlices(reason)
        self.memory_plan = smaller
        self.shrunk = True
        release(self.context.device)

    def _draws(self, batch: Batch, randomness: StepRandomness) -> Sequence[Draw]:
        lengths = self.module.out_length(batch.lengths)
        frames = int(self.module.out_length(batch.frames.shape[1]))
        passes = min(self.memory_plan.passes, len(lengths))
        columns, rng = self.spec.window.columns, randomness.negatives()
        return self.objective.draw(lengths, frames, columns, rng, passes, batch.classes)

    def _samples(self, batch: Batch) -> int:
        """Samples of the batch that a step goes through."""
        return len(batch.lengths)

    def _samples_at_once(self, batch: Batch) -> int:
        share = self.context.ranks.share(len(batch.lengths))
        return min(self.memory_plan.micro_batch, share.stop - share.start)

    def _encoded(self, batch: Batch, seed: int) -> microbatch.SlicedBatch:
        def encode(samples: slice, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
            # Checkpoints end a layer's second pass as soon as all tensors are there that its backward pass needs, and torch
            # (2.12) takes the noise of RReLU for there before it is drawn.
            to_the_end = set_checkpoint_early_stop(not self.effects.uses_randomness)
            with self._seeded(seed, samples.start), autocast(device, self.config.training.precision), to_the_end:
                return self.module.representations(
                    on_device(batch.frames, device, samples),
                    batch.lengths[samples],
                    torch.as_tensor(rows, device=device),
                    self.memory_plan.recompute,
                )

        device, frames = self.context.device, int(self.module.out_length(batch.frames.shape[1]))
        return microbatch.SlicedBatch(encode, self._samples(batch), frames, self.context.ranks)

    def _loss(self, representations: tuple[torch.Tensor, ...], draw: Draw) -> Total:
        score = self.objective(representations[0], representations[-1], draw, self.memory_plan.loss_room)
        return Total(score.loss, score.accuracy)

    @contextlib.contextmanager
    def _seeded(self, seed: int, first_sample: int) -> Iterator[None]:
        """What a module draws for some samples is the same at every call, and the caller's generators stay as they are."""
        with torch.random.fork_rng(devices=[self.context.device] if self.context.device.type == "cuda" else []):
            number = int(np.random.SeedSequence([seed, first_sample]).generate_state(1)[0])
            torch.default_generator.manual_seed(number)  # torch.manual_seed would seed GPUs that are not ours as well
            if self.context.device.type == "cuda":
                torch.cuda.default_generators[self.context.device.index or 0].manual_seed(number)
            yield

    def _should_meter(self, name: str, batch: Batch, draws: Sequence[Draw]) -> bool:
        padded = bool((batch.lengths < batch.frames.shape[1]).any())
        return self.context.meter.should_meter(
            f"{name}, stage {self.spec.stage}", batch.frames.shape[1], max(len(draw.rows) for draw in draws), padded
        )

    def _optimizer(self, trained: nn.Module) -> Optimizer:
        options = self.config.training
        how = self.spec.optimization or adam(options.lr, options.adam_eps)
        parameters = {name: value for name, value in trained.named_parameters() if value.requires_grad}
        return (HostOptimizer if self.memory_plan.optimizer_on_host else Optimizer)(parameters, how)

    def _label(self) -> None:
        """Tells the meter what is what."""
        parameters = [*self.module.parameters(), *self.objective.parameters()]
        self.context.meter.label("parameters", [*parameters, *self.module.buffers()])
        self.context.meter.label("optimizer", [*self.optimizer.on_device(), *self.predictor_optimizer.on_device()])

    def _label_gradients(self) -> None:
        meter = self.context.meter  # the hooks know it alone: a way back to a parameter would be a cycle
        for parameter in filter(lambda parameter: parameter.requires_grad, self.module.parameters()):
            parameter.register_post_accumulate_grad_hook(lambda parameter: meter.label("gradients", [parameter.grad]))

    def _forget_gradients(self) -> None:
        self.module.zero_grad()
        self.objective.zero_grad()

"""A stage on the device: module, objective and optimizers, and one step on a batch under the budget.

A step that runs out of memory is repeated in smaller slices with the same random numbers; the result does not change.
Everything random is seeded by the caller, so nothing has to be stored for that.

Several ranks take the same step, each with its share of the batch (see memory.microbatch). Between ranks slices do not become
smaller before the predictors have stepped: the other ranks would wait for something else.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import noop_context_fn, set_checkpoint_early_stop

from layerwise.config import Config
from layerwise.data.batches import Batch, gathered
from layerwise.errors import BudgetError
from layerwise.memory import microbatch
from layerwise.memory.copy_stream import Arriving, CopyStream
from layerwise.memory.device import (
    autocast,
    keep_dropout_from_cudnn,
    offloaded,
    once_more_where_full,
    pack_recurrent_weights,
    release,
    why_out_of_memory,
)
from layerwise.memory.meter import metered, uncounted
from layerwise.memory.microbatch import Part, Pending, Total
from layerwise.memory.packed import Packed
from layerwise.memory.plan import NARROW_ROOM, MemoryPlan
from layerwise.nets.module import Contexts, Module
from layerwise.nets.network import named_tensors
from layerwise.objectives.protocol import Arrays, Draw, Group, ObjectiveModule, Streamed
from layerwise.training.context import RunContext
from layerwise.training.loader import pinned
from layerwise.training.optimizer import HostOptimizer, LossScale, Optimizer, adam
from layerwise.training.spec import StageSpec, batch_effects

Outcome = TypeVar("Outcome")


class NoSmallerSlices(BudgetError):
    """Out of memory, and the slices cannot be made smaller."""


@dataclass(frozen=True, slots=True)
class StepRandomness:
    """What a step draws: negatives from a generator that is made anew at each attempt, and what the module draws."""

    negatives: Callable[[], np.random.Generator]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is drawn for a batch, on the host."""

    parts: Sequence[Draw]
    packed: Packed | None = None
    """The batch and the arrays of its only part, ready to go to the device together; None where they go there bit by bit."""


@dataclass(frozen=True, slots=True)
class _OnDevice:
    """A part whose arrays are on the device, all of them."""

    rows: np.ndarray
    draw: Any


@dataclass(frozen=True, slots=True)
class _There:
    """What the device has of a whole batch."""

    rows: torch.Tensor
    """int64 [R], those that are scored."""
    frames: list[torch.Tensor]
    """One tensor, until it is taken; none where they came otherwise."""


class StageTrainer:
    """Module, objective and their optimizers on the device, and its memory plan, which may become smaller."""

    def __init__(self, spec: StageSpec, config: Config, memory_plan: MemoryPlan, context: RunContext) -> None:
        self.spec, self.config, self.memory_plan, self.context = spec, config, memory_plan, context
        self.effects = batch_effects(spec)
        self.module, self.objective = self._build()
        """With the optimizer on the host they lie there too, and come to the device when they are needed."""
        self.optimizer = self._optimizer(self.module)
        self.predictor_optimizer = self._optimizer(self.objective)
        self._module_is_lent = False
        self._copies: CopyStream | None = None
        self._coming: dict[Packed, Arriving] = {}
        """Batches that are on their way to the device, or there before their step."""
        self.shrunk = False
        """Whether a step ran out of memory, so that the plan is smaller than it was."""
        self.scale = LossScale.of(config.training.precision)
        self._label()
        self._label_gradients()

    @property
    def modules(self) -> list[Module]:
        """That are trained at the same time."""
        return [self.module]

    def go_on_shrunk(self, micro_batch: int, parts: int) -> None:
        """Takes slices at least as small as an earlier start had to: with these it got where it stopped."""
        micro_batch, parts = min(micro_batch, self.memory_plan.micro_batch), max(parts, self.memory_plan.parts)
        room = min(self.memory_plan.loss_room, NARROW_ROOM)
        self.memory_plan = replace(self.memory_plan, micro_batch=micro_batch, parts=parts, loss_room=room, ahead=False)
        self.shrunk = True

    def optimizers(self) -> list[tuple[str, Optimizer]]:
        """Each with what a checkpoint writes before the names of its parameters."""
        return [("module/", self.optimizer), ("objective/", self.predictor_optimizer)]

    def prepared(self, batch: Batch, randomness: StepRandomness) -> Batch:
        """The batch with all that can be done for its step ahead of it. May be called by another thread."""
        drawn = self._draw(batch, randomness)
        frames = drawn.packed.frames if drawn.packed else None
        batch = pinned(batch, self.context.device) if frames is None else replace(batch, frames=frames)
        return replace(batch, drawn=drawn)

    def send_for(self, batch: Batch) -> None:
        """Has a prepared batch come to the device while the steps before it are computed, where the plan has room for it."""
        drawn = batch.drawn
        if not (
            self.memory_plan.ahead and isinstance(drawn, Drawn) and drawn.packed and drawn.packed.frames is not None
        ):
            return
        try:
            self._copies = self._copies or CopyStream(self.context.device)
            self._coming[drawn.packed] = self._copies.bring(drawn.packed.buffer)
        except (BudgetError, RuntimeError) as error:
            why_out_of_memory(error)
            self.memory_plan = replace(self.memory_plan, ahead=False)

    def forget_coming(self) -> None:
        """Lets go of batches that were sent for."""
        while self._coming:
            self._coming.popitem()[1].arrived()

    def train(self, batch: Batch, randomness: StepRandomness) -> Total:
        """One optimizer step; leaves no gradients behind. Raises BudgetError where not even the smallest slices fit."""
        self.module.train()
        drawn = self._drawn(batch, randomness)
        with metered(self._should_meter("training", batch, drawn.parts)):
            score = self._repeat_in_smaller_slices(self._attempt, drawn, batch, randomness)
            with self._beside_parameters():
                self._add_gradients()
                unscale = partial(self.scale.unscale, [*self.module.parameters()])
                if once_more_where_full(unscale, self.context.device):
                    _step(self.optimizer)
                self._forget_gradients()
        return self._agreed(score)

    def evaluate(self, batch: Batch, randomness: StepRandomness) -> Total:
        """The score of a batch, without a step."""
        self.module.eval()
        drawn = self._drawn(batch, randomness)
        with metered(self._should_meter("held-out", batch, drawn.parts)):
            return self._agreed(self._repeat_in_smaller_slices(self._score, drawn, batch, randomness))

    def vectors(self, batch: Batch, randomness: StepRandomness) -> torch.Tensor:
        """Of each window the mean of those outputs that its score would be made of: float32 [B, C] on the host."""
        self.module.eval()
        drawn = self._drawn(batch, randomness)
        with metered(self._should_meter("probe", batch, drawn.parts)):
            return self._repeat_in_smaller_slices(self._vectors, drawn, batch, randomness)

    @contextlib.contextmanager
    def offloaded(self) -> Iterator[None]:
        """Between two steps: the device is free of the stage inside the block, and holds the same bits again behind it."""
        if self.memory_plan.optimizer_on_host:
            yield
            return
        tensors = [*self.module.parameters(), *self.module.buffers(), *self.objective.parameters()]
        states = [*self.optimizer.on_device(), *self.predictor_optimizer.on_device()]
        with offloaded([*tensors, *states], self.context.device):
            yield
        pack_recurrent_weights(self.module)
        self._label()

    @contextlib.contextmanager
    def module_on_device(self) -> Iterator[None]:
        """The module is on the device inside the block, wherever it lies between two steps."""
        if self.memory_plan.optimizer_on_host and not self._module_is_lent:
            tensors = _tensors_of(self.module)
            at_once, changes = self.memory_plan.gradients_at_once, self.effects.changes_parameters
            with self.context.host.lend(tensors, self.context.device, at_once, changes):
                pack_recurrent_weights(self.module)
                self.context.meter.label("parameters", tensors)
                self._module_is_lent = True
                try:
                    yield
                finally:
                    self._module_is_lent = False
        else:
            yield

    def _build(self) -> tuple[Module, ObjectiveModule]:
        """With their first weights, where they lie between two steps."""
        seed, on_host = self.config.training.seed, self.memory_plan.optimizer_on_host
        place = torch.device("cpu") if on_host else self.context.device
        with self._beside_parameters():
            module, objective = self.spec.build_module(seed, place), self.spec.build_objective(self.config, place)
            if on_host and self.context.device.type == "cuda":  # elsewhere the one that is on the device is arranged
                for layer in module.layers.values():
                    layer.arrange_for_gpu()
        keep_dropout_from_cudnn(module)
        return module, objective

    def _beside_parameters(self) -> contextlib.AbstractContextManager[object]:
        """The context of work on parameters where they lie between two steps."""
        return uncounted() if self.memory_plan.optimizer_on_host else contextlib.nullcontext()

    def _drawn(self, batch: Batch, randomness: StepRandomness) -> Drawn:
        """What was drawn ahead, unless slices have become smaller since."""
        drawn = batch.drawn
        if isinstance(drawn, Drawn) and len(drawn.parts) == self._parts(batch):
            return drawn
        return self._draw(batch, randomness)

    def _draw(self, batch: Batch, randomness: StepRandomness) -> Drawn:
        parts = self._draws(batch, randomness)
        packed = None
        if self.memory_plan.at_once and isinstance(parts[0], Arrays):
            # Of a batch that several ranks share, each fetches its own samples alone.
            whole = self.context.ranks.count == 1 and batch.frames.device.type != "cuda"
            frames = batch.frames if whole else None
            packed = Packed.of(parts[0].arrays, frames, self.context.device)
        return Drawn(parts, packed)

    def _score(self, batch: microbatch.SlicedBatch, draws: Sequence[Part]) -> Total:
        with self._module_unless_streamed():
            with self.module_on_device():
                encoded = microbatch.encode(batch, self._rows(draws), with_graph=False)
            with contextlib.closing(self._losses()) as losses:
                return microbatch.score(batch, encoded, losses, draws)

    def _vectors(self, batch: microbatch.SlicedBatch, draws: Sequence[Part]) -> torch.Tensor:
        rows = self._rows(draws)
        with self._module_unless_streamed(), self.module_on_device():
            outputs = microbatch.encode(batch, rows, with_graph=False).encoded[-1]
        with uncounted():
            samples, values = torch.from_numpy(rows // batch.frames), outputs.to("cpu").float()
            totals = torch.zeros(batch.samples, values.shape[1]).index_add_(0, samples, values)
            return totals / samples.bincount(minlength=batch.samples).clamp(min=1)[:, None]

    def _attempt(self, batch: microbatch.SlicedBatch, draws: Sequence[Part]) -> Total:
        """All gradients of the module in place, and the predictors' step taken."""
        with self._module_unless_streamed():
            buffers = self._kept_buffers()
            with self.module_on_device():
                encoded = microbatch.encode(batch, self._rows(draws), with_graph=True)
            with contextlib.closing(self._losses()) as losses:
                pending = microbatch.loss_gradients(batch, encoded, losses, draws, self.scale.factor)
                self.context.meter.label("gradients", (parameter.grad for parameter in self.objective.parameters()))
            del encoded
            if self.memory_plan.gradients_wait:
                pending.move_to(self.context.host)
            if not self.effects.uses_randomness:
                # The predictors step at once and let go of their gradients: the module's come into their room.
                self._step_predictors()
            with self._beside_parameters():
                for buffer, values in buffers:
                    buffer.copy_(values)
            if self.effects.uses_randomness:
                self._replay(pending, batch)
                self._step_predictors()
            else:
                self._run_back(pending, batch)
            return pending.score

    def _module_unless_streamed(self) -> contextlib.AbstractContextManager[None]:
        """Where representations wait on the host, the module leaves the device while the loss is worked out."""
        return contextlib.nullcontext() if self.memory_plan.parts else self.module_on_device()

    def _kept_buffers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What a forward pass may change, where it is made twice of the whole batch."""
        if not self.memory_plan.parts or self.effects.why_unsliceable is None:
            return []
        with uncounted():
            return [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in self.module.buffers()]

    def _losses(self) -> Generator[microbatch.Loss]:
        """The objective, on the device for as long as the next loss is not asked for; several where it comes in groups."""
        plan, objective = self.memory_plan, self.objective
        if not plan.optimizer_on_host:
            yield self._whole_loss
            return
        stacked = objective.stacked if isinstance(objective, Streamed) else None
        others = [tensor for tensor in _tensors_of(objective) if tensor is not stacked]
        with self.context.host.lend(others, self.context.device):
            if stacked is None:
                yield self._whole_loss
            elif plan.parts <= 1:  # the representations stay while one group comes after another
                yield lambda representations, draw: self._loss_of(self._visits(stacked), representations, draw)
            else:  # a group stays while one part comes after another
                for rows, values, gradient in self._visits(stacked):
                    group = rows, values, gradient
                    yield partial(self._loss_of, [group])
                    del group, values, gradient

    def _visits(self, stacked: torch.Tensor) -> Iterator[Group]:
        """The predictors, as many at a time as the plan says."""
        at_once, graded = self.memory_plan.predictors or len(stacked), torch.is_grad_enabled()
        return self.context.host.visits(stacked, at_once, self.context.device, graded)

    def _whole_loss(self, representations: tuple[torch.Tensor, ...], part: Part) -> Total:
        score = self.objective(representations[0], representations[-1], _draw_of(part), self.memory_plan.loss_room)
        return Total(score.loss, score.accuracy)

    def _loss_of(self, groups: Iterable[Group], representations: tuple[torch.Tensor, ...], part: Part) -> Total:
        objective, room = cast(Streamed, self.objective), self.memory_plan.loss_room
        score = objective.streamed(representations[0], representations[-1], _draw_of(part), room, groups)
        return Total(score.loss, score.accuracy)

    def _step_predictors(self) -> None:
        """Their gradients are the same on all ranks, but for how each device rounds."""
        self.context.ranks.broadcast(
            parameter.grad for parameter in self.objective.parameters() if parameter.grad is not None
        )
        _step(self.predictor_optimizer)

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

    def _run_back(self, pending: Pending, batch: microbatch.SlicedBatch) -> None:
        """Cannot be left half done once the predictors have stepped, so it sees to its own memory."""
        as_it_is = self._may_lie_otherwise
        while True:
            try:
                self._replay(pending, batch)
                return
            except (BudgetError, RuntimeError) as error:
                reason = why_out_of_memory(error)
            self.module.zero_grad()
            if as_it_is:
                as_it_is = False
                release(self.context.device)
            elif self.memory_plan.micro_batch > 1 or self.effects.why_unsliceable:
                self._shrink(reason)
                batch = replace(batch, micro_batch=self.memory_plan.micro_batch)
            elif not pending.on_host:
                pending.move_to(self.context.host)
                release(self.context.device)
            else:
                raise NoSmallerSlices(reason)

    def _replay(self, pending: Pending, batch: microbatch.SlicedBatch) -> None:
        # Where it fails, the gradients that it has sent to the host are dropped with the module.
        with self.module_on_device():
            microbatch.run_back(pending, batch, self.context.host)

    def _repeat_in_smaller_slices(
        self,
        work: Callable[[microbatch.SlicedBatch, Sequence[Part]], Outcome],
        drawn: Drawn,
        batch: Batch,
        randomness: StepRandomness,
    ) -> Outcome:
        as_it_is = self._may_lie_otherwise
        while True:
            try:
                return self._once(work, drawn, batch, randomness.seed)
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
            if as_it_is:
                as_it_is = False
                release(self.context.device)
                continue
            self._shrink(reason)
            drawn = self._draw(batch, randomness)

    def _once(
        self,
        work: Callable[[microbatch.SlicedBatch, Sequence[Part]], Outcome],
        drawn: Drawn,
        batch: Batch,
        seed: int,
    ) -> Outcome:
        if not (drawn.packed and self.memory_plan.at_once):
            return work(self._sliced(batch, seed), drawn.parts)
        (part,) = drawn.parts
        coming = self._coming.pop(drawn.packed, None)
        whole = drawn.packed.on_device(self.context.device) if coming is None else coming.arrived()
        del coming
        arrays, frames = drawn.packed.unpacked(whole)
        del whole
        there = _There(arrays["rows"], [] if frames is None else [frames])
        del frames
        return work(self._sliced(batch, seed, there), [_OnDevice(part.rows, replace(cast(Any, part), **arrays))])

    @property
    def _may_lie_otherwise(self) -> bool:
        """Whether what did not fit may fit once everything free has been given back, for then it comes to lie elsewhere."""
        return self.context.device.type == "cuda"

    def _shrink(self, reason: str) -> None:
        if self.memory_plan.ahead:  # the next batch is there for speed alone
            self.memory_plan = replace(self.memory_plan, ahead=False)
            self.forget_coming()
            release(self.context.device)
            return
        if self.effects.why_unsliceable:
            raise NoSmallerSlices(f"{reason} {self.effects.why_unsliceable}, so the batch cannot be sliced.")
        smaller = self.memory_plan.smaller()
        if smaller is None:
            raise NoSmallerSlices(reason)
        self.memory_plan = smaller
        self.shrunk = True
        release(self.context.device)

    def _draws(self, batch: Batch, randomness: StepRandomness) -> Sequence[Draw]:
        lengths, frames = self.spec.vectors(batch.lengths), self.spec.vectors(batch.frames.shape[1])
        columns, rng = self.spec.vector_columns, randomness.negatives()
        return self.objective.draw(lengths, frames, columns, rng, self._parts(batch), batch.classes)

    def _parts(self, batch: Batch) -> int:
        return min(max(self.memory_plan.parts, 1), len(batch.lengths))

    def _samples(self, batch: Batch) -> int:
        """Samples of the batch that a step goes through."""
        return len(batch.lengths)

    def _samples_at_once(self, batch: Batch) -> int:
        share = self.context.ranks.share(len(batch.lengths))
        return min(self.memory_plan.micro_batch, share.stop - share.start)

    def _rows(self, draws: Sequence[Part]) -> np.ndarray:
        """int64 [R], sorted: all rows that are scored."""
        return microbatch.all_rows(draws)

    def _sliced(self, batch: Batch, seed: int, there: _There | None = None) -> microbatch.SlicedBatch:
        def encode(samples: slice, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
            # Checkpoints end a layer's second pass as soon as all tensors are there that its backward pass needs, and torch
            # (2.12) takes the noise of RReLU for there before it is drawn.
            to_the_end = set_checkpoint_early_stop(not self.effects.uses_randomness)
            whole = there if samples.stop - samples.start == len(batch.lengths) else None
            with self._seeded(seed, samples.start), autocast(device, self.config.training.precision), to_the_end:
                return self.module.representations(
                    self._frames(batch, samples, whole),
                    batch.lengths[samples],
                    torch.as_tensor(rows, device=device) if whole is None else whole.rows,
                    self._checkpoint_contexts if self.memory_plan.recompute else None,
                    self.spec.cells,
                )

        device, host, plan = self.context.device, self.context.host, self.memory_plan
        return microbatch.SlicedBatch(
            encode,
            samples=self._samples(batch),
            frames=self.spec.vectors(batch.frames.shape[1]),
            micro_batch=plan.micro_batch,
            device=device,
            host=host if plan.parts else None,
            ranks=self.context.ranks,
        )

    def _checkpoint_contexts(self) -> Contexts:
        """Of a layer whose activations are worked out again: in the forward pass, and in the backward pass."""
        return noop_context_fn()

    def _frames(self, batch: Batch, samples: slice, whole: _There | None) -> torch.Tensor:
        """float32 on the device. whole: what it has of the batch, where that is what is asked for."""
        if whole is not None and whole.frames:
            frames = whole.frames.pop()
            self.context.host.moved += frames.nbytes
        else:
            frames = self.context.host.bring(batch.frames, self.context.device, samples)
        return gathered(frames, batch.rows).float()

    @contextlib.contextmanager
    def _seeded(self, seed: int, first_sample: int) -> Iterator[None]:
        """What a module draws for some samples is the same at every call, and the caller's generators stay as they are."""
        if not self.effects.uses_randomness:
            yield
            return
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
        how = self.spec.optimization or adam(
            options.lr, options.adam_eps, options.warmup_steps, options.cosine, options.weight_decay
        )
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


def _draw_of(part: Part) -> Any:
    """What the objective takes."""
    return part.draw if isinstance(part, _OnDevice) else part


def _step(optimizer: Optimizer) -> None:
    """Half of a step cannot be taken back, so it is not repeated where memory runs out; torch's fused Adam needs none."""
    try:
        optimizer.step()
    except (BudgetError, RuntimeError) as error:
        reason = why_out_of_memory(error)
        raise NoSmallerSlices(
            f"{reason} That was within a step of the optimizer, which cannot be repeated: set memory.optimizer to host, and "
            "start the same command again."
        ) from None


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """What goes to the device and back with it, each once."""
    return list({id(tensor): tensor for _, tensor in named_tensors(module) if tensor.is_leaf}.values())

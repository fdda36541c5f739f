"""Trains one stage to convergence: what `layerwise run` does between two caches.

Each epoch draws new windows, trains on every batch, then measures the loss on the held-out samples at fixed windows with
fixed negatives. The best weights are kept. The stage has converged when the held-out loss has not fallen by the part
`min_delta` for `patience` epochs. Epochs at chance do not count: some stages stand there for long before they begin to learn,
and what lies above one that was stopped there has nothing to learn from.

Everything random is a function of (seed, stage, epoch, step), so a stage that was stopped anywhere ends with the same bits as
one that was not.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from layerwise.config import Config, TrainingOptions
from layerwise.data.batches import Batch, Epoch, ordered_epoch, stream, training_epoch
from layerwise.errors import RunError, TrainingError
from layerwise.events import EpochDone, StageStarted, StepDone
from layerwise.files import write_atomically
from layerwise.memory.meter import uncounted
from layerwise.training.checkpoint import (
    Arrays,
    Progress,
    load_checkpoint,
    load_stages,
    load_weights,
    purpose_of,
    save_checkpoint,
    weights_of,
)
from layerwise.training.epoch_probe import EpochProbe
from layerwise.training.first_weights import load_first_weights, take_from_data
from layerwise.training.loader import Loader, Prepare, as_read, augmented
from layerwise.training.run import Round
from layerwise.training.samples import HELD_OUT, TRAIN, sample_classes
from layerwise.training.scores import UnreadScores
from layerwise.training.simultaneous import AnyTrainer
from layerwise.training.trainer import StepRandomness


def fit(trainer: AnyTrainer, loader: Loader, round: Round) -> tuple[Arrays, Progress]:
    """Trains to convergence or to the round's share of max_epochs, from the checkpoint where there is one.

    Gives the weights of the epoch with the lowest held-out loss, and where the training has ended.
    Raises Interrupted after saving, TrainingError where the loss is not a number.
    """
    options, spec, context = trainer.config.training, trainer.spec, trainer.context
    meter = context.meter
    stage, store, training_key = spec.stage, round.store, round.training_key(spec.stage)
    record = round.state.record(stage)
    train, held_out = (np.flatnonzero(round.run.split == part) for part in (TRAIN, HELD_OUT))
    classes = sample_classes(trainer.config, round.run.data)
    probe = (
        EpochProbe.of(trainer.config, round.run.data, round.run.split, spec, loader) if options.probe_every else None
    )
    progress, best = _resume(round, trainer) or _begin(round, trainer, loader, train)
    epochs = epochs_of_round(options, round.number)
    if record.earlier:  # at least one: the weights of another input are not those of this one
        epochs = max(options.max_epochs - progress.first_epoch, 1)
    context.notify(StageStarted(stage, progress.epoch, progress.step, round.number))
    started = time.monotonic() - progress.seconds
    last_save = time.monotonic()

    unread: UnreadScores[tuple[int, int]] = UnreadScores(context.device)
    is_first = True
    """Whoever caps the allocator waits for the first step: it has loaded the kernels of the stage."""

    def take_in_scores() -> None:
        """Of the steps since the last time."""
        progress.note_peak(meter)
        live = meter.live
        for (step, steps), loss, accuracy in unread.read():
            _check_finite(loss, stage, progress.epoch, options.lr)
            progress.loss_sum += loss
            progress.accuracy_sum += accuracy
            context.notify(StepDone(stage, progress.epoch, step, steps, loss, accuracy, live, progress.peak_bytes))

    def save() -> None:
        nonlocal last_save
        take_in_scores()
        progress.seconds = time.monotonic() - started
        if context.ranks.first:
            save_checkpoint(store.checkpoint(stage), training_key, progress, trainer, best)
        last_save = time.monotonic()

    def stop_if_asked() -> None:
        if context.asked_to_stop():
            save()
            context.ranks.barrier()  # torchrun kills the other ranks when one ends before all have saved
            context.stop.raise_if_set(f"in stage {stage}, epoch {progress.epoch + 1}, after step {progress.step}")

    while progress.epoch - progress.first_epoch < epochs and progress.plateau_epochs < options.patience:
        epoch_started = time.monotonic()
        for _, optimizer in trainer.optimizers():
            optimizer.begin_epoch(progress.epoch)
        rng = stream(options.seed, "epoch", stage, progress.epoch)
        epoch = training_epoch(loader, train, spec.window, options.batch_size, rng, spec.renderings)
        randomness = partial(_randomness, options.seed, stage, progress.epoch)
        augment = partial(_augmented, options, stage, progress.epoch) if stage > 1 else as_read
        for step, batch in _batches(epoch, loader, trainer, classes, progress.step, augment, randomness):
            for _, optimizer in trainer.optimizers():
                optimizer.begin_step(progress.epoch * epoch.steps + step, options.max_epochs * epoch.steps)
            score = trainer.train(batch, randomness(step))
            progress.step = step + 1
            unread.add((step, epoch.steps), score)
            if unread.due or is_first or progress.step == epoch.steps:
                take_in_scores()
                is_first = False
            if time.monotonic() - last_save > options.checkpoint_seconds:
                save()
            stop_if_asked()

        held_out_loss, held_out_accuracy = evaluate(trainer, loader, held_out, classes, stop_if_asked)
        _check_finite(held_out_loss, stage, progress.epoch, options.lr)
        probed: dict[str, float] = {}
        if probe is not None and (progress.epoch + 1) % options.probe_every == 0:
            probed["probe_error"] = probe_error(trainer, loader, probe, classes, stop_if_asked)
        progress.note_peak(meter)
        entry: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "loss": progress.loss_sum / epoch.steps,
            "accuracy": progress.accuracy_sum / epoch.steps,
            "held_out_loss": held_out_loss,
            "held_out_accuracy": held_out_accuracy,
            "seconds": time.monotonic() - epoch_started,
            "peak_bytes": progress.peak_bytes,
            **probed,
        }
        if _close_epoch(progress, entry, trainer.config):
            best = weights_of(trainer.module)
        if context.ranks.first:
            lines = "".join(json.dumps(entry) + "\n" for entry in progress.history)
            write_atomically(store.metrics(stage), lines.encode())
        save()
        record.epochs, record.best_loss, record.seconds = progress.epoch, progress.best_loss, progress.seconds
        record.train_peak_bytes = progress.peak_bytes
        round.save()
        context.notify(EpochDone(stage, **entry))
        stop_if_asked()

    assert best is not None
    return best, progress


def evaluate(
    trainer: AnyTrainer,
    loader: Loader,
    held_out: np.ndarray,
    classes: np.ndarray | None,
    after_batch: Callable[[], None],
) -> tuple[float, float]:
    """Loss and accuracy on the held-out samples, at windows and negatives that are the same at every call.

    held_out: int64, sample numbers; classes: int64 [N] of all samples, for objectives that learn a label;
    after_batch: is called after each batch and may raise.
    """
    options, spec = trainer.config.training, trainer.spec
    windows = stream(options.seed, "held-out windows", spec.stage)
    epoch = ordered_epoch(loader, held_out, spec.window, options.batch_size, windows, spec.renderings)
    unread: UnreadScores[float] = UnreadScores(trainer.context.device)
    loss = accuracy = 0.0
    randomness = partial(_held_out_randomness, options.seed, spec.stage)
    for step, batch in _batches(epoch, loader, trainer, classes, 0, as_read, randomness):
        unread.add(len(batch.lengths) / len(epoch.samples), trainer.evaluate(batch, randomness(step)))
        after_batch()
        if unread.due or step + 1 == epoch.steps:
            for share, batch_loss, batch_accuracy in unread.read():
                loss += share * batch_loss
                accuracy += share * batch_accuracy
    return loss, accuracy


def probe_error(
    trainer: AnyTrainer,
    loader: Loader,
    probe: EpochProbe,
    classes: np.ndarray | None,
    after_batch: Callable[[], None],
) -> float:
    """How many of the asked samples are taken for another class. Parameters as those of `evaluate`."""
    seed, stage, vectors = trainer.config.training.seed, trainer.spec.stage, []
    randomness = partial(_held_out_randomness, seed, stage)
    for step, batch in _batches(probe.epoch, loader, trainer, classes, 0, as_read, randomness):
        vectors.append(trainer.vectors(batch, randomness(step)))
        after_batch()
    with uncounted():
        return probe.error(torch.cat(vectors))


def epochs_of_round(options: TrainingOptions, round: int) -> int:
    """Most epochs of a stage in this round, from 1; the epochs of all rounds make max_epochs."""
    return options.max_epochs * round // options.rounds - options.max_epochs * (round - 1) // options.rounds


def _randomness(seed: int, stage: int, epoch: int, step: int) -> StepRandomness:
    negatives = partial(stream, seed, "negatives", stage, epoch, step)
    return StepRandomness(negatives, int(stream(seed, "module", stage, epoch, step).integers(2**62)))


def _held_out_randomness(seed: int, stage: int, step: int) -> StepRandomness:
    return StepRandomness(partial(stream, seed, "held-out negatives", stage, step))


def _augmented(options: TrainingOptions, stage: int, epoch: int, step: int, batch: Batch) -> Batch:
    return augmented(batch, options, stream(options.seed, "augmentation", stage, epoch, step))


def _batches(
    epoch: Epoch,
    loader: Loader,
    trainer: AnyTrainer,
    classes: np.ndarray | None,
    first: int,
    augment: Prepare,
    randomness: Callable[[int], StepRandomness],
) -> Iterator[tuple[int, Batch]]:
    """The batches of steps `first` on, prepared ahead of them."""

    def prepare(step: int, batch: Batch) -> Batch:
        labelled = batch if classes is None else replace(batch, classes=classes[epoch.samples_of(step)])
        return trainer.prepared(augment(step, labelled), randomness(step))

    batches = zip(range(first, epoch.steps), loader.batches(epoch, first, trainer.offloaded, prepare), strict=True)
    return _sent_for(batches, trainer) if trainer.memory_plan.ahead else batches


def _sent_for(batches: Iterator[tuple[int, Batch]], trainer: AnyTrainer) -> Iterator[tuple[int, Batch]]:
    """Each batch when the next one has been sent for: it comes to the device while this one's step is computed."""
    try:
        current = next(batches, None)
        while current is not None:
            following = next(batches, None)
            if following is not None:
                trainer.send_for(following[1])
            yield current
            current = following
    finally:
        trainer.forget_coming()


def _check_finite(loss: float, stage: int, epoch: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"The loss of stage {stage} became {loss} in epoch {epoch + 1}; lower --lr, which is {lr}, and start again "
            f"with --from-stage {stage}."
        )


def _begin(round: Round, trainer: AnyTrainer, loader: Loader, samples: np.ndarray) -> tuple[Progress, Arrays | None]:
    """From first weights. samples: int64 [N], those that are trained on."""
    first = load_first_weights(round.run.store)
    if first is None:
        take_from_data(trainer, loader, samples)
    else:
        with uncounted():  # the meter would take what lies on the host for what is on the device
            names = trainer.module.state_dict().keys()
        load_weights(trainer.module, {name: first[name] for name in names})
    return Progress(), None


def _resume(round: Round, trainer: AnyTrainer) -> tuple[Progress, Arrays | None] | None:
    """The checkpoint of this round, else what came before it: an earlier training, or the last one of the round before. None
    where there is nothing to go on from."""
    stage, earlier = trainer.spec.stage, round.earlier
    if further := _resume_further(round, trainer):
        return further
    saved = load_checkpoint(round.store.checkpoint(stage), round.training_key(stage), trainer)
    if saved is None and earlier is not None:
        path = earlier.store.checkpoint(stage)
        before = load_checkpoint(path, earlier.training_key(stage), trainer)
        if before is None:
            raise RunError(f"{path} is gone, with which the next round begins; start the same command again.")
        saved = before[0].on_other_input(), None
    return saved


def _resume_further(round: Round, trainer: AnyTrainer) -> tuple[Progress, Arrays | None] | None:
    """Where the stage stood when more epochs were asked for; None where there is no such, or it has gone on from there."""
    stage, store = trainer.spec.stage, round.store
    record = round.state.record(stage)
    earlier = record.earlier
    if earlier is None or (purpose := purpose_of(store.checkpoint(stage))) == round.training_key(stage):
        return None
    if earlier.checkpoint is not None and purpose == earlier.checkpoint:
        saved = load_checkpoint(store.checkpoint(stage), purpose, trainer)
        assert saved is not None
        progress, best = saved if earlier.same_input else (saved[0].on_other_input(), None)
        return replace(progress, seconds=max(progress.seconds, record.seconds)), best
    if earlier.weights is None:
        raise RunError(
            f"{store.checkpoint(stage)} is gone, from which stage {stage} goes on; train it anew with --from-stage {stage}."
        )
    load_weights(trainer.module, load_stages(store, [replace(record, weights=earlier.weights)]))
    return Progress(epoch=earlier.epochs, first_epoch=earlier.epochs, seconds=record.seconds), None


def _close_epoch(progress: Progress, entry: dict[str, Any], config: Config) -> bool:
    """Adds the epoch to the progress. Returns whether its held-out loss is the lowest so far."""
    progress.history.append(entry)
    loss = entry["held_out_loss"]
    is_best = progress.best_loss is None or loss < progress.best_loss
    if is_best:
        progress.best_loss = loss
    if progress.plateau_loss is None or loss < progress.plateau_loss * (1 - config.training.min_delta):
        progress.plateau_loss, progress.plateau_epochs = loss, 0
    # A stage that only learns by heart is no better than a guess on what is held out, but it is on what it has seen.
    elif not config.objective.is_at_chance(min(progress.best_loss, entry["loss"])):
        progress.plateau_epochs += 1
    progress.epoch += 1
    progress.step, progress.loss_sum, progress.accuracy_sum = 0, 0.0, 0.0
    return is_best

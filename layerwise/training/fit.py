"""One stage to convergence: what `layerwise run` does between two caches.

Each epoch draws new windows, trains on every batch, then measures the loss on the held-out samples at fixed windows with
fixed negatives. The best weights are kept. The stage has converged when the held-out loss has not fallen by the part
`min_delta` for `patience` epochs. Everything random is a function of (seed, stage, epoch, step), so a stage that was
stopped anywhere ends with the same bits as one that was not."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from layerwise.config import Config, TrainingOptions
from layerwise.data.batches import Batch, Epoch, held_out_epoch, stream, training_epoch
from layerwise.errors import RunError, TrainingError
from layerwise.events import EpochDone, Notify, StageStarted, StepDone
from layerwise.files import write_atomically
from layerwise.memory.meter import AnyMeter
from layerwise.memory.plan import Placement
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.stop import StopFlag
from layerwise.training.checkpoint import Arrays, Progress, load_checkpoint, save_checkpoint, to_host
from layerwise.training.loader import Loader, augmented
from layerwise.training.schedule import asked_to_stop
from layerwise.training.simultaneous import AnyTrainer, SimultaneousTrainer
from layerwise.training.spec import StageSpec
from layerwise.training.trainer import StageTrainer, StepRandomness


@dataclass(frozen=True, slots=True)
class StageFiles:
    """Where the training of a stage is saved."""

    checkpoint: Path
    metrics: Path
    made_for: str
    """Names the stage's input and options; a checkpoint of another name is refused."""
    before: tuple[Path, str] | None = None
    """Checkpoint of the round before, at its end, and what that was made for; None in the first round."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The outcome of a stage's training."""

    weights: Arrays
    """Of the epoch with the lowest held-out loss."""
    epochs: int
    converged: bool
    best_loss: float
    seconds: float
    peak_bytes: int
    """Highest of all epochs, those before a resume included."""
    placement: Placement
    """At the end: smaller than at the beginning where a step ran out of memory."""


def train_stage(
    spec: StageSpec,
    config: Config,
    loader: Loader,
    train: np.ndarray,
    held_out: np.ndarray,
    classes: np.ndarray | None,
    device: torch.device,
    placement: Placement,
    meter: AnyMeter,
    files: StageFiles,
    stop: StopFlag,
    notify: Notify,
    round: int = 1,
    ranks: Ranks = ALONE,
) -> Trained:
    """Trains to convergence or to the round's share of max_epochs, from the checkpoint where there is one.

    train, held_out: int64 sample numbers; classes: int64 [N] of all samples, for objectives that learn a label; ranks: who
    trains it together; the first one writes. Raises Interrupted after saving, TrainingError where the loss is not a number.
    """
    options = config.training
    trainer: AnyTrainer
    if spec.parts:
        trainer = SimultaneousTrainer(spec, config, device, placement, meter)
    else:
        trainer = StageTrainer(spec, config, device, placement, meter, ranks)
    progress, best = _found(files, trainer)
    epochs = epochs_of_round(options, round)
    notify(StageStarted(spec.stage, progress.epoch, progress.step, round))
    started = time.monotonic() - progress.seconds
    last_save = time.monotonic()

    def save() -> None:
        progress.seconds = time.monotonic() - started
        if ranks.first:
            save_checkpoint(files.checkpoint, files.made_for, progress, trainer, best)

    def poll() -> None:
        if asked_to_stop(stop, ranks):
            save()
            ranks.meet()  # one that ended before it was saved would have the others killed
            stop.raise_if_set(f"in stage {spec.stage}, epoch {progress.epoch + 1}, after step {progress.step}")

    while not _finished(progress, epochs, options.patience):
        epoch_started = time.monotonic()
        trainer.begin_epoch(progress.epoch)
        rng = stream(options.seed, "epoch", spec.stage, progress.epoch)
        epoch = training_epoch(loader, train, spec.window, options.batch_size, rng, spec.renderings)
        for step, batch in _batches(epoch, loader, classes, trainer, first=progress.step):
            key = (spec.stage, progress.epoch, step)
            if spec.stage > 1:
                batch = augmented(batch, options, stream(options.seed, "augmentation", *key))
            module_seed = int(stream(options.seed, "module", *key).integers(2**62))
            score = trainer.train(batch, StepRandomness(partial(stream, options.seed, "negatives", *key), module_seed))
            loss, accuracy = score.loss.item(), score.accuracy.item()
            _check_finite(loss, spec.stage, progress.epoch, options.lr)
            progress.step = step + 1
            progress.loss_sum += loss
            progress.accuracy_sum += accuracy
            notify(StepDone(spec.stage, progress.epoch, step, epoch.steps, loss, accuracy, meter.live, meter.peak))
            if time.monotonic() - last_save > config.training.checkpoint_seconds:
                save()
                last_save = time.monotonic()
            poll()

        held_out_loss, held_out_accuracy = evaluate(trainer, loader, held_out, classes, options, poll)
        _check_finite(held_out_loss, spec.stage, progress.epoch, options.lr)
        seconds = time.monotonic() - epoch_started
        if _close_epoch(
            progress, epoch.steps, held_out_loss, held_out_accuracy, options.min_delta, seconds, meter.peak
        ):
            best = to_host(trainer.module.state_dict())
        if ranks.first:
            lines = "".join(json.dumps(entry) + "\n" for entry in progress.history)
            write_atomically(files.metrics, lines.encode())
        save()
        last_save = time.monotonic()
        notify(EpochDone(spec.stage, **progress.history[-1]))
        poll()

    assert best is not None and progress.best_loss is not None
    converged = progress.plateau_epochs >= options.patience
    peak = max(entry["peak_bytes"] for entry in progress.history[progress.first_epoch :])
    return Trained(
        best, progress.epoch, converged, progress.best_loss, time.monotonic() - started, peak, trainer.placement
    )


def evaluate(
    trainer: AnyTrainer,
    loader: Loader,
    samples: np.ndarray,
    classes: np.ndarray | None,
    options: TrainingOptions,
    poll: Callable[[], None],
) -> tuple[float, float]:
    """Loss and accuracy on samples at windows and negatives that are the same at every call.

    `poll` is called between batches and may raise.
    """
    stage = trainer.spec.stage
    windows = stream(options.seed, "held-out windows", stage)
    epoch = held_out_epoch(loader, samples, trainer.spec.window, options.batch_size, windows, trainer.spec.renderings)
    loss = accuracy = 0.0
    for step, batch in _batches(epoch, loader, classes, trainer, first=0):
        score = trainer.evaluate(
            batch, StepRandomness(partial(stream, options.seed, "held-out negatives", stage, step))
        )
        poll()
        share = len(batch.lengths) / len(epoch.samples)
        loss += share * score.loss.item()
        accuracy += share * score.accuracy.item()
    return loss, accuracy


def _batches(
    epoch: Epoch, loader: Loader, classes: np.ndarray | None, trainer: AnyTrainer, first: int
) -> Iterator[tuple[int, Batch]]:
    for step, batch in zip(range(first, epoch.steps), loader.batches(epoch, first, trainer.offloaded), strict=True):
        yield step, batch if classes is None else replace(batch, classes=classes[epoch.samples_of(step)])


def _check_finite(loss: float, stage: int, epoch: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"The loss of stage {stage} became {loss} in epoch {epoch + 1}; lower --lr, which is {lr}, and start again "
            f"with --from-stage {stage}."
        )


def epochs_of_round(options: TrainingOptions, round: int) -> int:
    """Most epochs of a stage in this round, from 1; over all rounds they make max_epochs."""
    return options.max_epochs * round // options.rounds - options.max_epochs * (round - 1) // options.rounds


def _found(files: StageFiles, trainer: AnyTrainer) -> tuple[Progress, Arrays | None]:
    """What an earlier start has saved of this round, or else the end of the round before, or else the beginning."""
    saved = load_checkpoint(files.checkpoint, files.made_for, trainer)
    if saved is None and files.before is not None:
        path, made_for = files.before
        ended = load_checkpoint(path, made_for, trainer)
        if ended is None:
            raise RunError(f"{path} is gone, with which the next round begins; start the same command again.")
        saved = ended[0].in_next_round(), None
    return saved or (Progress(), None)


def _finished(progress: Progress, epochs: int, patience: int) -> bool:
    return progress.epoch - progress.first_epoch >= epochs or progress.plateau_epochs >= patience


def _close_epoch(
    progress: Progress,
    steps: int,
    held_out_loss: float,
    held_out_accuracy: float,
    min_delta: float,
    seconds: float,
    peak_bytes: int,
) -> bool:
    """Enters the epoch into the progress; says whether its held-out loss is the lowest so far."""
    progress.history.append(
        {
            "epoch": progress.epoch + 1,
            "loss": progress.loss_sum / steps,
            "accuracy": progress.accuracy_sum / steps,
            "held_out_loss": held_out_loss,
            "held_out_accuracy": held_out_accuracy,
            "seconds": seconds,
            "peak_bytes": peak_bytes,
        }
    )
    is_best = progress.best_loss is None or held_out_loss < progress.best_loss
    if is_best:
        progress.best_loss = held_out_loss
    if progress.plateau_loss is None or held_out_loss < progress.plateau_loss * (1 - min_delta):
        progress.plateau_loss, progress.plateau_epochs = held_out_loss, 0
    else:
        progress.plateau_epochs += 1
    progress.epoch += 1
    progress.step, progress.loss_sum, progress.accuracy_sum = 0, 0.0, 0.0
    return is_best

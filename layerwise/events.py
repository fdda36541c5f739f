"""What a run tells while it works. Whoever wants to show it passes a function that takes these."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """Something worth a line in the log."""

    text: str


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run is prepared or found again; nothing is trained yet."""

    stages: int
    done: tuple[int, ...]
    """Stages that an earlier start has finished."""
    max_epochs: int
    budget_bytes: int | None
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage is loaded onto the device; `epoch` and `step` are not 0 where it goes on from a checkpoint."""

    stage: int
    epoch: int
    step: int
    round: int = 1


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step; `steps` is the number in an epoch, `live_bytes` what the device holds after it.

    A GPU goes on meanwhile: it tells of several steps at once, some later than they were taken.
    """

    stage: int
    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    live_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class EpochDone:
    """One pass over the training samples and over the held-out ones."""

    stage: int
    epoch: int
    loss: float
    accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    seconds: float
    peak_bytes: int
    probe_error: float | None = None
    """From 0 to 1, after the epochs that --probe-every names."""


@dataclass(frozen=True, slots=True)
class CachingProgress:
    """Rows of the stage's activation cache that are handed to the writer."""

    stage: int
    rows: int
    total: int
    live_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class StageDone:
    """The stage is trained, cached, sealed and off the device."""

    stage: int
    epochs: int
    converged: bool
    best_loss: float
    train_peak_bytes: int
    cache_peak_bytes: int
    device_bytes_left: int
    cache_bytes: int
    seconds: float
    round: int = 1


Event = Message | RunStarted | StageStarted | StepDone | EpochDone | CachingProgress | StageDone
Notify = Callable[[Event], None]


def silent(event: Event) -> None:
    """Shows nothing."""


def broadcast(*receivers: Notify) -> Notify:
    """Passes each event to every receiver, in their order."""

    def notify(event: Event) -> None:
        for receiver in receivers:
            receiver(event)

    return notify


@dataclass(frozen=True, slots=True)
class Progress:
    """What a command other than a run is at, such as a probe or an extraction."""

    doing: str
    done: int
    total: int
    """Of the same: samples, or steps of the work."""


NotifyProgress = Callable[[Progress | Message], None]


def unseen(event: Progress | Message) -> None:
    """Shows nothing."""

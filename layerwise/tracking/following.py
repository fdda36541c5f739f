"""From the events of a run to a service, and from the name of a service to its file."""

from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from types import TracebackType

from layerwise.config import Config
from layerwise.errors import ConfigError
from layerwise.events import EpochDone, Event, Message, Notify, StageDone
from layerwise.run_store import RunStore
from layerwise.tracking.protocol import Nowhere, Open, Tracker


def find_service(name: str) -> Open:
    """The service that `--log` names. Raises ConfigError where its package is not installed."""
    if name == "none":
        return lambda store, run_id, config: Nowhere()
    try:
        return import_module(f"layerwise.tracking.{name}").open_tracker
    except ImportError as error:
        raise ConfigError(
            f"--log {name}: the package for it is missing ({error}); pip install 'layerwise[{name}]'."
        ) from None


def open_service(name: str, open_tracker: Open, store: RunStore, run_id: str, config: Config) -> Tracker:
    """The run at the service. Raises ConfigError where the service refuses it."""
    try:
        return open_tracker(store, run_id, config)
    except Exception as error:  # each service has errors of its own
        raise ConfigError(f"--log {name}: {error} Mend that, or leave --log out.") from None


class Following:
    """A context manager; takes the events of a run, tells the tracker what it can draw, and passes them on."""

    def __init__(self, tracker: Tracker, notify: Notify) -> None:
        self._tracker, self._notify = tracker, notify

    def __enter__(self) -> "Following":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._try(lambda: self._tracker.close(kind is None))

    def __call__(self, event: Event) -> None:
        self._notify(event)
        match event:
            case EpochDone():
                values = {name: value for name, value in asdict(event).items() if name not in ("stage", "epoch")}
                self._try(lambda: self._tracker.log(event.stage, event.epoch, values))
            case StageDone():
                cached = {"cache_peak_bytes": event.cache_peak_bytes, "cache_bytes": event.cache_bytes}
                self._try(lambda: self._tracker.log(event.stage, event.epochs, cached))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever becomes of a service, days of training must not end with it
            self._tracker = Nowhere()
            self._notify(Message(f"--log takes no more, metrics.jsonl goes on: {error}"))

"""Services that show curves: the numbers of a run go to the one that `--log` names, beside metrics.jsonl.

TensorBoard, Weights & Biases and MLflow are optional packages; each is imported only where a run names it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any

from layerwise.config import Config, options, value_of
from layerwise.errors import ConfigError
from layerwise.events import EpochDone, Event, Message, Notify, StageDone
from layerwise.run_store import RunStore

MLFLOW_EXPERIMENT = "layerwise"
MLFLOW_TAG = "layerwise.run_id"


class Tracker:
    """One run at a service; this one, at none. A method may raise whatever the service's own package raises."""

    modules: tuple[str, ...] = ()
    """What must be there to import."""

    def __init__(self, *run: object) -> None:
        """run: its files, id and options. The run of this id is opened at the service, or gone on with."""

    def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a stage by name; `step` counts epochs of this stage from 1 and never falls, over all starts."""

    def close(self, done: bool) -> None:
        """After the last numbers of this start; done: the run is finished, not stopped and not failed."""


class TensorBoard(Tracker):
    """Event files in stages/S/tensorboard/, so that the stages lie in one chart, each a line of its own.

    Retraining a stage deletes them with the rest of its folder.
    """

    modules = ("torch.utils.tensorboard",)

    def __init__(self, store: RunStore, run_id: str, config: Config) -> None:
        self._store = store
        self._writers: dict[int, Any] = {}

    def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if stage not in self._writers:
            self._writers[stage] = SummaryWriter(str(self._store.curves(stage)))
        for name, value in values.items():
            self._writers[stage].add_scalar(name, value, step)
        self._writers[stage].flush()  # an epoch that is logged here once is not logged again after a kill

    def close(self, done: bool) -> None:
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases(Tracker):
    """One run there for each run here, gone on with by its id. WANDB_MODE=offline keeps it on this disk.

    Charts are called stage-S/NAME, over the epochs of that stage.
    """

    modules = ("wandb",)

    def __init__(self, store: RunStore, run_id: str, config: Config) -> None:
        import wandb

        self._run = wandb.init(
            project="layerwise",
            name=_shown_name(store),
            id=run_id,
            resume="allow",
            dir=str(store.out),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),  # the live table is no text to keep
        )
        self._defined: set[int] = set()

    def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._defined:
            self._run.define_metric(f"stage-{stage}/*", step_metric=f"stage-{stage}/epoch")
            self._defined.add(stage)
        self._run.log({f"stage-{stage}/{name}": value for name, value in {**values, "epoch": step}.items()})

    def close(self, done: bool) -> None:
        self._run.finish(0 if done else 75)  # as the command itself exits


class MLflow(Tracker):
    """A run in the experiment `layerwise`, found again by a tag. MLFLOW_TRACKING_URI says at which server or file.

    Metrics are called stage-S/NAME, over the epochs of that stage.
    """

    modules = ("mlflow", "mlflow.entities")

    def __init__(self, store: RunStore, run_id: str, config: Config) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(MLFLOW_EXPERIMENT)
        place = experiment.experiment_id if experiment else self._client.create_experiment(MLFLOW_EXPERIMENT)
        earlier = self._client.search_runs([place], f"tags.`{MLFLOW_TAG}` = '{run_id}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            run = self._client.create_run(place, tags={MLFLOW_TAG: run_id}, run_name=_shown_name(store))
            self._id = run.info.run_id
            chosen = [Param(option.key, str(value_of(config, option.key))) for option in options()]
            self._client.log_batch(self._id, params=chosen)

    def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(f"stage-{stage}/{k}", v, now, step) for k, v in values.items()])

    def close(self, done: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


_SERVICES: dict[str, type[Tracker]] = {
    "none": Tracker,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""Value of `--log` to its tracker."""


def find_service(name: str) -> type[Tracker]:
    """The service that `--log` names. Raises ConfigError where its package is not installed."""
    try:
        for module in _SERVICES[name].modules:
            import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--log {name}: the package for it is missing ({error}); pip install 'layerwise[{name}]'."
        ) from None
    return _SERVICES[name]


def open_service(name: str, open_tracker: type[Tracker], store: RunStore, run_id: str, config: Config) -> Tracker:
    """The run at the service. Raises ConfigError where the service refuses it."""
    try:
        return open_tracker(store, run_id, config)
    except Exception as error:  # each service has errors of its own
        raise ConfigError(f"--log {name}: {error} Mend that, or leave --log out.") from None


class TrackingCallback:
    """A context manager; takes the events of a run, gives the tracker what it can draw, and passes them on."""

    def __init__(self, tracker: Tracker, notify: Notify) -> None:
        self._tracker, self._notify = tracker, notify

    def __enter__(self) -> "TrackingCallback":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._try(lambda: self._tracker.close(kind is None))

    def __call__(self, event: Event) -> None:
        self._notify(event)
        match event:
            case EpochDone():
                fields = asdict(event).items()
                values = {name: value for name, value in fields if name not in ("stage", "epoch") and value is not None}
                self._try(lambda: self._tracker.log(event.stage, event.epoch, values))
            case StageDone():
                cached = {"cache_peak_bytes": event.cache_peak_bytes, "cache_bytes": event.cache_bytes}
                self._try(lambda: self._tracker.log(event.stage, event.epochs, cached))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever becomes of a service, days of training must not end with it
            self._tracker = Tracker()
            self._notify(Message(f"--log takes no more, metrics.jsonl goes on: {error}"))


def _shown_name(store: RunStore) -> str:
    """NAME of runs/NAME; METHOD/seed-N of a run that is part of a comparison."""
    out = store.out.resolve()
    return f"{out.parent.name}/{out.name}" if out.name.startswith("seed-") else out.name

"""MLflow: a run in the experiment `layerwise`, found again by a tag. MLFLOW_TRACKING_URI says at which server or file."""

import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from layerwise.config import Config, options, value_of
from layerwise.run_store import RunStore
from layerwise.tracking.protocol import shown_name

EXPERIMENT = "layerwise"
TAG = "layerwise.run_id"


class MLflow:
    """Metrics are called stage-S/NAME, over the epochs of that stage."""

    def __init__(self, store: RunStore, run_id: str, config: Config) -> None:
        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        place = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
        earlier = self._client.search_runs([place], f"tags.`{TAG}` = '{run_id}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            run = self._client.create_run(place, tags={TAG: run_id}, run_name=shown_name(store))
            self._id = run.info.run_id
            chosen = [Param(option.key, str(value_of(config, option.key))) for option in options()]
            self._client.log_batch(self._id, params=chosen)

    def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(f"stage-{stage}/{k}", v, now, step) for k, v in values.items()])

    def close(self, done: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


open_tracker = MLflow

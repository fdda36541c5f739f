"""Weights & Biases: one run of its own for each run, gone on with by its id. WANDB_MODE=offline keeps it on this disk."""

from collections.abc import Mapping

import wandb

from layerwise.config import Config
from layerwise.run_store import RunStore
from layerwise.tracking.protocol import shown_name


class WeightsAndBiases:
    """Charts are called stage-S/NAME, over the epochs of that stage."""

    def __init__(self, store: RunStore, run_id: str, config: Config) -> None:
        self._run = wandb.init(
            project="layerwise",
            name=shown_name(store),
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


open_tracker = WeightsAndBiases

"""A round of a run while it is at work: what the tasks of the round share."""

from dataclasses import dataclass

import numpy as np
import torch

from layerwise.config import Config, load
from layerwise.data.source import DataSet
from layerwise.errors import RunError
from layerwise.events import Notify
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.run_directory import RunPaths, RunState
from layerwise.stop import StopFlag
from layerwise.training.fingerprint import training_key
from layerwise.training.plan import StagePlan
from layerwise.training.planner import StageLayout
from layerwise.training.storage import Storage, keep_of_round


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that the tasks of one round share."""

    config: Config
    round: int
    """From 1; the last one is the run itself."""
    paths: RunPaths
    """Of this round, as `state` is."""
    state: RunState
    data: DataSet
    split: np.ndarray
    """uint8 [N], see training.split."""
    plans: list[StagePlan]
    layouts: list[StageLayout]
    storage: Storage
    device: torch.device
    stop: StopFlag
    notify: Notify
    earlier: "Run | None" = None
    """The round before."""
    ranks: Ranks = ALONE
    """Who performs its tasks together: each holds the same state, and the first one alone writes."""

    @property
    def keep(self) -> str:
        """Which caches stay once all stages are done; an earlier round has served its purpose by then."""
        return keep_of_round(self.config, self.round)

    def save(self) -> None:
        """Replaces run.json. Raises RunError."""
        if self.ranks.first:
            self.state.save(self.paths.state)

    def key(self, stage: int) -> str:
        """The training key of a stage whose lower stages are done, as is the stage itself in the round before."""
        below = self.state.record(stage - 1).fingerprint if stage > 1 else None
        if self.round > 1 and self.earlier is None:
            raise RunError(
                f"{self.paths.out} has lost the folder of its round {self.round - 1}; begin anew with --overwrite."
            )
        before = self.earlier.state.record(stage).fingerprint if self.earlier else None
        plan = self.plans[stage - 1]
        how = plan.optimization.identity if plan.optimization else None
        return training_key(self.config, self.data.identity, below, before, stage, plan.layers, how)

    def trained_with(self, stage: int) -> Config:
        """The options of a trained stage; where `--from-stage` has changed some, those below keep theirs."""
        return load(self.paths.stage_config(stage))

"""A round of a run while it is at work: what the tasks of the round share.

Names what a cache was made from: everything that could change one of its bits."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch

from layerwise.config import Config, options, value_of
from layerwise.data.source import DataSet
from layerwise.errors import RunError
from layerwise.events import Notify
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.run_store import RunState, RunStore
from layerwise.stop import StopFlag
from layerwise.training.budget import StageLayout
from layerwise.training.cache_plan import CachePlan, keep_of_round
from layerwise.training.spec import StageSpec


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that the tasks of one round share."""

    config: Config
    round: int
    """From 1; the last one is the run itself."""
    store: RunStore
    """Of this round, as `state` is."""
    state: RunState
    data: DataSet
    split: np.ndarray
    """uint8 [N], see training.split."""
    specs: list[StageSpec]
    layouts: list[StageLayout]
    storage: CachePlan
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
            self.store.save_state(self.state)

    def key(self, stage: int) -> str:
        """The training key of a stage whose lower stages are done, as is the stage itself in the round before."""
        below = self.state.record(stage - 1).fingerprint if stage > 1 else None
        if self.round > 1 and self.earlier is None:
            raise RunError(
                f"{self.store.out} has lost the folder of its round {self.round - 1}; begin anew with --overwrite."
            )
        before = self.earlier.state.record(stage).fingerprint if self.earlier else None
        spec = self.specs[stage - 1]
        how = spec.optimization.identity if spec.optimization else None
        return training_key(self.config, self.data.identity, below, before, stage, spec.layers, how)

    def trained_with(self, stage: int) -> Config:
        """The options of a trained stage; where `--from-stage` has changed some, those below keep theirs."""
        return self.store.read_stage_config(stage)


def training_key(
    config: Config,
    data_identity: str,
    below: str | None,
    before: str | None,
    stage: int,
    layers: range,
    optimization: str | None,
) -> str:
    """SHA-256 of the input of a stage and of all options that act on its result.

    below, before: fingerprints of the stage below in this round, and of this stage in the round before. optimization: the
    identity of an optimizer of the user's.
    """
    acting = {option.key: value_of(config, option.key) for option in options() if option.scope != "place"}
    return _digest([data_identity, below, before, stage, layers.start, layers.stop, acting, optimization])


def fingerprint(key: str, weights_digest: str) -> str:
    """SHA-256 of a stage's training key and the weights that came of it."""
    return _digest([key, weights_digest])


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

"""A run in one process, its rounds, and the fingerprints that say what each stage was made from."""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
import torch

from layerwise.config import Config, options, value_of
from layerwise.data.source import DataSet
from layerwise.errors import RunError
from layerwise.memory.plan import MemoryPlan
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.run_store import RunState, RunStore
from layerwise.training.cache_plan import CachePlan
from layerwise.training.spec import StageSpec


@dataclass(frozen=True, slots=True)
class Run:
    """What is the same for all rounds and tasks of a run."""

    config: Config
    store: RunStore
    data: DataSet
    split: np.ndarray
    """uint8 [N], see training.samples."""
    specs: list[StageSpec]
    memory_plans: list[MemoryPlan]
    cache_plan: CachePlan
    device: torch.device
    ranks: Ranks = ALONE
    """The processes that perform its tasks together; the first one alone writes and holds the locks."""

    @property
    def rounds(self) -> int:
        """Number of rounds; 1 for a sequential run."""
        return self.config.training.rounds

    def keep(self, number: int) -> str:
        """What --keep says, in the last round; of an earlier one nothing stays that no stage is to read."""
        return self.config.cache.keep if number == self.rounds else "nothing"

    def round(self, number: int) -> "Round":
        """A round as run.json describes it now, with the rounds before it."""
        found = None
        for each in range(1, number + 1):
            store = self.store.round(each, self.rounds)
            if each < number and not store.exists:  # a user may delete earlier rounds of a finished run
                continue
            found = Round(self, each, store, store.load_state(), found)
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a run; the last one is the run itself."""

    run: Run
    number: int
    """From 1."""
    store: RunStore
    state: RunState
    earlier: "Round | None" = None
    """The round before."""

    @property
    def is_last(self) -> bool:
        """Whether probes and the encoder read this round."""
        return self.number == self.run.rounds

    @property
    def keep(self) -> str:
        """Which caches stay once all stages are done."""
        return self.run.keep(self.number)

    def save(self) -> None:
        """Replaces run.json. Raises RunError."""
        if self.run.ranks.first:
            self.store.save_state(self.state)

    def training_key(self, stage: int) -> str:
        """SHA-256 of the input of a stage and of all options that act on its result.

        Every lower stage must be done, and so must the stage itself in the round before. Raises RunError where that round
        is gone.
        """
        if self.number > 1 and self.earlier is None:
            raise RunError(
                f"{self.store.out} has lost the folder of its round {self.number - 1}; begin anew with --overwrite."
            )
        config, spec, earlier = self.run.config, self.run.specs[stage - 1], self.state.record(stage).earlier
        return _digest(
            [
                self.run.data.identity,
                self.state.record(stage - 1).fingerprint if stage > 1 else None,
                self.earlier.state.record(stage).fingerprint if self.earlier else earlier and asdict(earlier),
                stage,
                spec.layers.start,
                spec.layers.stop,
                _options_in_key(config),
                spec.optimization.identity if spec.optimization else None,
                *([PICTURES_SINCE] if self.run.data.columns > 1 else []),
                *([CONVNET_SINCE] if config.net.name == "convnet" else []),
            ]
        )


PICTURES_SINCE = "windows begin at any pixel, negatives are targets of their step"
"""Earlier versions trained pictures otherwise: what they have half trained is not gone on with."""

CONVNET_SINCE = "maps are halved by means"
"""Earlier versions halved them by a stride."""

OPTIONS_SINCE = {
    "training.warmup_steps": 0,
    "training.cosine": False,
    "training.weight_decay": 0.0,
    "objective.cells": 1,
    "net.mirrored": False,
}
"""Options that earlier versions did not have, with the values at which they change nothing: there they are left out."""


def _options_in_key(config: Config) -> dict[str, object]:
    """Those that act on the result of a stage."""
    values = {option.key: value_of(config, option.key) for option in options() if option.scope != "place"}
    return {key: value for key, value in values.items() if key not in OPTIONS_SINCE or value != OPTIONS_SINCE[key]}


def fingerprint(training_key: str, weights_digest: str) -> str:
    """SHA-256 of a stage's training key and of its trained weights: names what its cache was made from."""
    return _digest([training_key, weights_digest])


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

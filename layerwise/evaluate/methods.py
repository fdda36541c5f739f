"""The methods that Greedy InfoMax is compared with (Löwe et al. 2019, tables 1 and 2), each as options of a run."""

from collections.abc import Mapping
from typing import Any

from layerwise.config import Config, with_options

GREEDY = "greedy-infomax"
UNTRAINED = "untrained"

METHODS: Mapping[str, Mapping[str, Any]] = {
    GREEDY: {"training.schedule": "sequential"},
    "greedy-infomax-simultaneous": {
        "training.schedule": "simultaneous",
        # Against inputs that never change, which only training one after another has.
        "training.input_noise": 0.0,
        "training.frame_dropout": 0.0,
    },
    "cpc": {"training.schedule": "sequential", "training.stages": 1},
    "greedy-supervised": {"training.schedule": "sequential", "objective.name": "supervised"},
    "supervised": {"training.schedule": "sequential", "training.stages": 1, "objective.name": "supervised"},
    UNTRAINED: {"training.schedule": "sequential"},
}
"""Name to the options in which it differs from a run of one's own; `untrained` is not run at all."""


def config_of(method: str, seed: int, config: Config, label: str, out: str, cache_dir: str) -> Config:
    """The options of one run of a method. Every module of every method is trained for `max_epochs` epochs.

    The budget is for training one stage at a time: what is trained as a whole goes without.
    """
    changes = {"objective.label": ""} | dict(METHODS[method])
    changes |= {"training.seed": seed, "training.patience": config.training.max_epochs}
    changes |= {"out": out, "cache.dir": cache_dir}
    if changes.get("objective.name") == "supervised":
        changes["objective.label"] = label
    if changes.get("training.stages") == 1 or changes.get("training.schedule") == "simultaneous":
        changes |= {"memory.gpu_mem": None, "cache.policy": "never"}
    return with_options(config, changes)

"""What is tried with each network that is brought: cut, plan, run, stop, resume, extract."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, Brought, built

import layerwise
from layerwise.errors import Interrupted
from layerwise.events import silent
from layerwise.nets.network import Network
from layerwise.stop import StopFlag


def samples_of(brought: Brought) -> np.ndarray:
    """Sixteen samples: of ids twelve frames each, as steps."""
    rng = np.random.default_rng(0)
    if brought.ids:
        return rng.integers(0, brought.ids, (16, 12 * brought.frame_shape[1]))
    return rng.standard_normal((16, *brought.frame_shape)).astype(np.float32)


def options_of(brought: Brought) -> dict[str, Any]:
    if not brought.ids:
        return {"frames": "whole", "views": 4, "batch_size": 8, "max_epochs": 1}
    framing = {
        "data.frame_length": brought.frame_shape[1],
        "data.window": 8,
        "objective.steps": 2,
        "objective.negatives": 4,
    }
    return {"frames": "steps", "batch_size": 8, "max_epochs": 1, "options": framing}


def request(name: str, folder: Path) -> tuple[Network, dict[str, Any]]:
    """The network in two stages, and what else a plan and a run are given; the samples lie in the folder."""
    brought = NETWORKS[name]
    np.save(folder / "samples.npy", samples_of(brought))
    places = {"out": str(folder / "run"), "cache_dir": str(folder / "cache"), "data": f"npy:{folder / 'samples.npy'}"}
    network = layerwise.cut(built(name), torch.zeros(8, *brought.frame_shape), at=[brought.at])
    return network, options_of(brought) | places


def planned(name: str, folder: Path) -> layerwise.Forecast:
    """What a run would take."""
    network, asked = request(name, folder)
    return layerwise.plan(network, **asked)


def trained(name: str, folder: Path) -> tuple[int, ...]:
    """Trains the network, with a stop between two stages, as another process would go on; and extracts features.

    Gives the number of units in each stage. Raises what goes wrong.
    """
    network, asked = request(name, folder)
    stop = StopFlag()
    with pytest.raises(Interrupted):
        layerwise.run(network, **asked, stop=stop, on_stage=lambda done: stop.ask("the test"), notify=silent)
    again, asked = request(name, folder)
    result = layerwise.run(again, **asked, notify=silent)
    assert [stage.status for stage in result.state.stages] == ["done", "done"]
    layerwise.extract(asked["out"], folder / "samples.npy", folder / "features.npy", network=network)
    features = np.load(folder / "features.npy")
    assert len(features) == 16 * (12 if NETWORKS[name].ids else 1)
    assert np.isfinite(features).all()
    assert features.std() > 0
    return network.natural_cut

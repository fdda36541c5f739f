"""What is tried with each network that is brought: cut, plan, run, stop, resume, extract."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, Brought, built

import layerwise
from layerwise.errors import Interrupted
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


def row(name: str, folder: Path) -> tuple[int, list[int]]:
    """Takes the network from the cut to the features of its encoder, with a stop between two stages.

    Gives the number of units and the units in each stage. Raises what goes wrong.
    """
    brought, out = NETWORKS[name], folder / "run"
    np.save(folder / "samples.npy", samples_of(brought))
    data = f"npy:{folder / 'samples.npy'}"
    asked: dict[str, Any] = options_of(brought) | {"out": str(out), "cache_dir": str(folder / "cache")}
    model = built(name)
    network = layerwise.cut(model, torch.zeros(8, *brought.frame_shape), stages=2)
    assert len(layerwise.plan(network, data, **asked).stages) == 2
    stop = StopFlag()
    with pytest.raises(Interrupted):
        layerwise.run(
            network, data, **asked, stop=stop, on_stage=lambda done: stop.ask("the test"), notify=lambda event: None
        )
    again = layerwise.cut(built(name), torch.zeros(8, *brought.frame_shape), stages=2)
    result = layerwise.run(again, data, **asked, notify=lambda event: None)
    assert [stage.status for stage in result.state.stages] == ["done", "done"]
    layerwise.extract(out, folder / "samples.npy", folder / "features.npy", network=built(name))
    features = np.load(folder / "features.npy")
    assert len(features) == 16 * (12 if brought.ids else 1)
    assert np.isfinite(features).all()
    assert features.std() > 0
    return len(network.layers), list(network.natural_cut)

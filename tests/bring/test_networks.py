"""Networks of libraries and of people's own: from the cut to the features, and what each stage computes."""

from pathlib import Path

import pytest
import torch
from networks import NETWORKS, built
from rows import row

import layerwise
from layerwise.nets.tracing import trace

LIBRARY = {"timm": "timm", "transformers": "transformers"}


def needs_its_library(name: str) -> None:
    library = name.partition(" ")[0]
    if library in LIBRARY:
        pytest.importorskip(
            library, reason=f"{library} is not installed: pip install -c constraints.txt 'layerwise[dev]'"
        )


UNITS = {
    "timm vit": 8,
    "timm resnet": 8,
    "timm convnext": 8,
    "timm swin": 8,
    "timm efficientnet": 8,
    "transformers vit": 8,
    "transformers wav2vec2": 8,
    "transformers hubert": 8,
    "transformers bert": 8,
    "transformers gpt2": 8,
}
"""Into how many stages each can be cut."""


@pytest.mark.parametrize("name", UNITS)
def test_a_network_of_a_library_is_cut_between_its_blocks(name: str) -> None:
    needs_its_library(name)
    network = layerwise.cut(built(name), torch.zeros(2, *NETWORKS[name].frame_shape))
    assert len(network.layers) == UNITS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_units_hold_the_weights_of_the_network_under_its_names(name: str) -> None:
    needs_its_library(name)
    model = built(name)
    units = trace(model, torch.zeros(1, *NETWORKS[name].frame_shape))
    held = {key: value for unit in units for key, value in unit.state_dict(keep_vars=True).items()}
    known = model.state_dict(keep_vars=True)
    assert all(value is known[key] for key, value in held.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_cut_planned_trained_stopped_resumed_and_extracted(name: str, tmp_path: Path) -> None:
    needs_its_library(name)
    row(name, tmp_path)

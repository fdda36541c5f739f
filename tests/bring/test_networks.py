"""Networks of libraries and of people's own: from the cut to the features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NETWORKS, built
from rows import planned, trained

import layerwise

LIBRARIES = ("timm", "transformers")

UNITS = {
    "timm vit": 10,
    "timm resnet": 10,
    "timm convnext": 14,
    "timm swin": 13,
    "timm efficientnet": 28,
    "transformers vit": 10,
    "transformers wav2vec2": 19,
    "transformers hubert": 19,
    "transformers bert": 16,
    "transformers gpt2": 9,
    "torchvision resnet": 7,
    "torchvision vit": 9,
    "torchvision swin": 10,
    "torchvision convnext": 8,
    "own 1-D": 4,
    "own 3-D": 5,
    "own tokens": 5,
    "own tied": 4,
    "own recurrent": 3,
    "own with hooks": 3,
}
"""Into how many stages each can be cut."""

NOT_ON_THE_WAY = ("pooler", "masked_spec_embed")
"""Parameters of transformers that do not act on the last hidden states."""

TRAINED = ("timm vit", "transformers wav2vec2", "transformers bert", "own recurrent", "own with hooks")
"""benchmarks/brought.py trains all of them."""


def needs_its_library(name: str) -> None:
    library = name.partition(" ")[0]
    if library in LIBRARIES:
        pytest.importorskip(library, reason=f"needs pip install -c constraints.txt 'layerwise[{library}]'")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_cut_between_its_blocks_and_keeps_its_weights_and_their_names(name: str) -> None:
    needs_its_library(name)
    model = built(name)
    network = layerwise.cut(model, torch.zeros(2, *NETWORKS[name].frame_shape))
    assert len(network.layers) == UNITS[name]
    on_meta = network.build(range(len(network.layers)), 0, "meta")  # so that no tensor is made on a device of its own
    on_meta(torch.empty(2, 1, *NETWORKS[name].frame_shape, device="meta"), np.ones(2, dtype=np.int64))
    known = model.state_dict()
    layers = network.build(range(len(network.layers)), 0, "cpu").layers.values()
    held = {key.removeprefix("unit."): value for layer in layers for key, value in layer.state_dict().items()}
    assert all(torch.equal(value, known[key]) for key, value in held.items())
    left_out = {key for key, _ in model.named_parameters()} - held.keys()
    assert all(key.startswith(NOT_ON_THE_WAY) for key in left_out), left_out


@pytest.mark.parametrize("name", TRAINED)
def test_a_network_is_cut_trained_stopped_resumed_and_extracted(name: str, tmp_path: Path) -> None:
    needs_its_library(name)
    assert len(trained(name, tmp_path)) == 2


def test_a_network_of_a_library_is_planned(tmp_path: Path) -> None:
    needs_its_library("transformers bert")
    assert len(planned("transformers bert", tmp_path).stages) == 2

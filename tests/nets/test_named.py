"""Networks that --net names: torchvision's, and what a function of the user's makes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import models

from layerwise.config import NetOptions
from layerwise.errors import ConfigError
from layerwise.nets.named import named_network

MINE = """
import layerwise
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))

def sized(frame_shape):
    return nn.Linear(frame_shape[0], 5)

def cut():
    return layerwise.cut(plain(), torch.zeros(4, 4), stages=1)

def text():
    return "no network"

def broken():
    raise ValueError("not today")
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_networks", raising=False)


@pytest.mark.parametrize(("name", "layers"), [("plain", 2), ("sized", 1), ("cut", 2)])
def test_a_function_makes_the_network(name: str, layers: int) -> None:
    network = named_network(NetOptions(name=f"my_networks:{name}"), (4,), seed=0)
    assert len(network.layers) == layers
    assert len(network.natural_cut) == (1 if name == "cut" else layers)


def test_the_seed_decides_on_its_first_weights_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        named_network(NetOptions(name="my_networks:plain"), (4,), seed).identity for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    structures = {named_network(NetOptions(name="my_networks:plain"), (4,), seed).structure for seed in (1, 2)}
    assert len(structures) == 1


def test_torchvision_comes_without_its_classifier_and_computes_what_the_model_does() -> None:
    network = named_network(NetOptions(name="torchvision:resnet18"), (3, 32, 32), seed=3)
    module = network.build(range(len(network.layers)), 0, "cpu").eval()
    torch.manual_seed(3)
    model = models.resnet18()
    model.fc = torch.nn.Identity()
    pictures = torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(module(pictures, np.array([1, 1]))[1][:, 0], model.eval()(pictures[:, 0]), atol=1e-5)


def test_a_vision_transformer_takes_pictures_of_the_size_that_there_are() -> None:
    network = named_network(NetOptions(name="torchvision:vit_b_32"), (3, 64, 64), seed=0)
    assert len(network.layers) > 5


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("torchvision:resnet5", (3, 32, 32), "Did you mean .*resnet50"),
        ("torchvision:resnet18", (1, 32, 32), "reads square colour pictures"),
        ("my_networks:plane", (4,), r"has no function plane; it was found at .*my_networks.py. Did you mean plain\?"),
        ("my_networks:text", (4,), "gives a str"),
        ("my_networks:broken", (4,), r"the function failed \(ValueError: not today\)"),
        ("nowhere.at_all:net", (4,), "there is no module nowhere"),
    ],
)
def test_what_names_no_network_is_refused(name: str, shape: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        named_network(NetOptions(name=name), shape, seed=0)

"""Trained weights by the names of the network's own module: they fit a fresh one strictly, which computes what the encoder
does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import layerwise
from layerwise.config import NetOptions
from layerwise.engines.run import RunResult, UserObjects
from layerwise.nets import build_network
from layerwise.nets.module import Module
from layerwise.nets.named import named_network
from layerwise.nets.traced import traced_network

FRAME = (3, 8, 8)
FRAMES = torch.rand(5, *FRAME, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """Has a layer of two names, buffers, and a head that its forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.stem = self.body[0]
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def fits(fresh: nn.Module, out: Path, folder: Path, left_out: tuple[str, ...], network: object = None) -> None:
    """Asserts that the weights of the run, and those exported, make the module compute what the encoder does."""
    encoder = layerwise.load(out, network=network)
    *_, expected = encoder.frames_of_stages(FRAMES[None])
    weights = layerwise.state_dict(out, network=network)
    written = layerwise.export(out, folder, "state-dict", network=network)
    exported = load_file(folder / "model.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in exported.items())
    assert written.left_out == left_out
    own = fresh.state_dict()
    fresh.load_state_dict({**{name: own[name] for name in left_out}, **weights}, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(FRAMES), expected[0], rtol=1e-5, atol=1e-5)


def test_weights_fit_a_fresh_network_of_ones_own(
    run_tiny: Callable[..., RunResult], pictures: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Own()
    result = run_tiny("vision", f"images:{pictures}", UserObjects(traced_network(model, FRAME)))
    torch.manual_seed(1)
    fits(Own(), result.paths.out, tmp_path / "exported", ("head.weight", "head.bias"), model)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "without head.weight, head.bias, which were not trained" in card
    assert "reads frames (N, 3, 8, 8): pixels from 0 to 1, less" in card


@pytest.mark.usefixtures("half_resnet")
def test_weights_fit_a_fresh_network_of_torchvision(
    run_tiny: Callable[..., RunResult], pictures: Path, tmp_path: Path
) -> None:
    options = {"net.name": "torchvision:resnet18", "training.stages": "fewest"}
    result = run_tiny("vision", f"images:{pictures}", **options)
    fresh = named_network(NetOptions(name="torchvision:resnet18"), FRAME, seed=7).model
    assert fresh is not None
    fits(fresh, result.paths.out, tmp_path / "exported", ())
    assert "conv1.weight" in fresh.state_dict()


class Papers(Module):
    """The layers of the paper's network, one after another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[None]
        for layer in self.layers.values():
            x = layer(x)
        return x[0]


def test_weights_of_the_papers_network_fit_a_fresh_one(vision_run: RunResult, tmp_path: Path) -> None:
    network = build_network(vision_run.config.net, FRAME)
    built = network.build(range(len(network.layers)), 7, "cpu")
    fresh = Papers({int(index): layer for index, layer in built.layers.items()})
    fits(fresh, vision_run.paths.out, tmp_path / "exported", ())

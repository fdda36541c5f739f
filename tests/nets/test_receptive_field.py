"""Which rows of a picture an output depends on, against what gradients say; and which cells have none in common."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from layerwise.nets.network import Network
from layerwise.nets.receptive_field import rows_between, rows_seen
from layerwise.nets.traced import traced_network

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a convolution": lambda: nn.Conv2d(2, 3, 3, padding=1),
    "strided": lambda: nn.Sequential(nn.Conv2d(2, 3, 5, stride=2), nn.ReLU(), nn.AvgPool2d(2)),
    "dilated": lambda: nn.Conv2d(2, 3, 3, dilation=2),
    "a residual block": lambda: nn.Sequential(nn.Conv2d(2, 4, 1), BasicBlock(4, 4)),
    "one that looks at all": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Upsample(4)),
}


def network_of(build: Callable[[], nn.Module]) -> Network:
    torch.manual_seed(0)
    return traced_network(build(), (2, 16, 16))


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_rows_that_are_seen_are_those_that_gradients_reach(build: Callable[[], nn.Module]) -> None:
    network = network_of(build)
    layers = range(len(network.layers))
    pictures = torch.randn(8, 1, 2, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outputs = network.build(layers, 0, "cpu").eval()(pictures, np.ones(8, dtype=np.int64))[1]
    reached = []
    for row in range(outputs.shape[3]):
        (gradient,) = torch.autograd.grad(outputs[:, :, :, row].pow(2).sum(), pictures, retain_graph=True)
        reached.append((gradient != 0).movedim(3, 0).flatten(1).any(1).numpy())
    assert np.array_equal(rows_seen(network, layers, (2, 16, 16)), np.stack(reached))


def test_cells_with_the_rows_between_them_see_no_row_in_common_and_one_fewer_is_too_few() -> None:
    seen = rows_seen(network_of(NETWORKS["a convolution"]), range(1), (2, 16, 16))  # three rows each
    assert [rows_between(seen, cells) for cells in (2, 4, 8, 16)] == [None, 1, 1, 2]


def test_where_all_is_seen_from_everywhere_no_cells_are_apart() -> None:
    network = network_of(NETWORKS["one that looks at all"])
    assert rows_between(rows_seen(network, range(len(network.layers)), (2, 16, 16)), 4) is None

"""The natural cuts, building, and the shapes of the paper's two networks; cuts under a budget: training/test_cutting."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from layerwise.config import NetOptions
from layerwise.nets import build_network, shortest_window
from layerwise.nets.module import Geometry
from layerwise.nets.network import ranges

SPEECH = NetOptions()
VISION = NetOptions(name="vision", width=64)


def sizes(net: NetOptions) -> list[int]:
    return [len(layers) for layers in build_network(net, (1, 16, 16)).natural_ranges]


def test_the_natural_cuts_are_the_papers() -> None:
    assert sizes(SPEECH) == [1, 1, 1, 1, 1, 1]
    assert sizes(VISION) == [3, 4, 6]


def test_the_natural_ranges_are_all_layers_in_order() -> None:
    for net in (SPEECH, VISION):
        network = build_network(net, (1, 16, 16))
        layers = [layer for part in network.natural_ranges for layer in part]
        assert layers == list(range(len(network.layers)))


def test_sizes_become_ranges_that_lie_side_by_side() -> None:
    assert ranges([2, 1, 3]) == [range(2), range(2, 3), range(3, 6)]


def test_the_speech_network_has_the_papers_shapes() -> None:
    network = build_network(SPEECH, (1,))
    module = network.build(range(6), 0, "meta")
    targets, outputs = module(torch.empty(2, 20480, 1, device="meta"), np.array([20480, 20480]))
    assert [int(network.build(range(n), 0, "meta").out_length(20480)) for n in range(1, 6)] == [
        4095,
        1023,
        512,
        257,
        128,
    ]
    assert targets.shape == (2, 128, 512)
    assert outputs.shape == (2, 128, 256)
    assert module.geometry(Geometry()).hop == 160


def test_the_vision_network_has_the_papers_shapes() -> None:
    network = build_network(VISION, (1, 16, 16))
    frames = torch.empty(1, 49, 1, 16, 16, device="meta")
    for layers, shape in zip(network.natural_ranges, [(256, 16, 16), (512, 8, 8), (1024, 4, 4)], strict=True):
        _, frames = network.build(layers, 0, "meta")(frames, np.array([49]))
        assert frames.shape == (1, 49, *shape)


def test_first_weights_do_not_depend_on_the_cut() -> None:
    network = build_network(NetOptions(width=4, context=3), (1,))
    together = dict(network.build(range(6), 7, "cpu").named_parameters())
    apart = {
        name: value for i in range(6) for name, value in network.build(range(i, i + 1), 7, "cpu").named_parameters()
    }
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in together)


def test_building_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_network(NetOptions(width=4), (1,)).build(range(2), 7, "cpu")
    assert torch.equal(torch.rand(1), expected)


def test_building_seeds_no_generator_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise AssertionError("the generators of all GPUs were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    build_network(NetOptions(width=4), (1,)).build(range(2), 7, "cpu")


def test_first_weights_are_drawn_on_the_cpu_and_copied_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[tuple[nn.Module, torch.device]] = []

    def copied(layer: nn.Module, device: torch.device) -> nn.Module:
        arrived.append((layer, device))
        return layer

    network = build_network(NetOptions(width=4), (1,))
    expected = network.build(range(6), 7, "cpu").state_dict()
    assert not arrived
    monkeypatch.setattr("layerwise.nets.network.copied", copied)
    found = network.build(range(6), 7, "cuda").state_dict()
    assert [device.type for _, device in arrived] == ["cuda"] * 6
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_without_values_a_layer_is_built_where_it_is_to_be(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network(NetOptions(width=2**14, context=0), (1,))
    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        module = network.build(range(2), 7, device)
    assert all(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in module.parameters())


@pytest.mark.gpu
def test_a_seed_gives_the_same_first_weights_on_a_gpu_and_leaves_its_generator_alone() -> None:
    network = build_network(NetOptions(width=8, context=5), (1,))
    expected = network.build(range(6), 7, "cpu")
    state = torch.cuda.get_rng_state()
    found = network.build(range(6), 7, "cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(parameter.is_cuda for parameter in found.parameters())
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value.cpu(), expected.state_dict()[name]) for name, value in found.state_dict().items())
    frames, lengths = torch.randn(2, 4000, 1), np.array([4000, 4000])
    with torch.no_grad():
        there, here = found(frames.cuda(), lengths)[1].cpu(), expected(frames, lengths)[1]
    assert torch.allclose(there, here, atol=1e-3)


@pytest.mark.parametrize("frames", [1, 2, 14])
def test_the_shortest_window_is_the_shortest_that_gives_so_many_frames(frames: int) -> None:
    module = build_network(SPEECH, (1,)).build(range(6), 0, "meta")
    shortest = shortest_window(SPEECH, frames)
    assert module.out_length(shortest) >= frames > module.out_length(shortest - 1)


def test_geometry_points_at_the_centre_of_what_a_frame_sees() -> None:
    module = build_network(NetOptions(width=4, context=0), (1,)).build(range(5), 0, "cpu")
    geometry = module.geometry(Geometry())
    x = torch.zeros(1, 4000, 1, requires_grad=True)
    frame = 10
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.01)
    module(x, np.array([4000]))[1][0, frame].sum().backward()
    seen = x.grad[0, :, 0].nonzero()
    middle = (seen.min() + seen.max()).item() / 2
    assert middle == pytest.approx(geometry.hop * frame + geometry.offset, abs=1)


@pytest.mark.parametrize("layers", range(1, 7))
def test_of_no_frame_nothing_comes_however_long_the_padding(layers: int) -> None:
    """The paper's third layer alone would make a frame of its padding."""
    module = build_network(NetOptions(width=4, context=4), (1,)).build(range(layers), 0, "cpu")
    shortest = next(length for length in range(1, 1000) if module.out_length(length) >= 1)
    outputs = module(torch.zeros(1, shortest, 1), np.array([shortest]))[1]
    assert outputs.shape[1] == module.out_length(shortest)
    assert module.out_length(np.array([0, shortest - 1])).tolist() == [0, 0]

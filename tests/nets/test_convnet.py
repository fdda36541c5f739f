"""The convolutional network for whole pictures, and what it takes of its first weights from them."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from layerwise.config import NetOptions
from layerwise.nets.convnet import FLAT, MapConvolution, _centres, convnet
from layerwise.nets.module import Module
from layerwise.nets.receptive_field import rows_seen

OPTIONS = NetOptions(name="convnet", width=8, blocks=(1, 2))
ONE = np.ones(40, dtype=np.int64)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Blurred noise, float32 [40, 1, 3, 32, 32]: neighbours are alike, as in pictures."""
    noise = torch.randn(40, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool2d(noise, 5, 1)[:, None] * 3


@pytest.fixture
def module() -> Module:
    return convnet(OPTIONS, 3).build(range(3), 0, "cpu")


def begun(module: Module, pictures: torch.Tensor) -> Module:
    module.first_weights_from(pictures, np.random.default_rng(0))
    return module


def test_each_layer_reads_channels_of_mean_0_and_deviation_1(module: Module, pictures: torch.Tensor) -> None:
    begun(module, pictures)
    x = pictures
    for number, layer in module.layers.items():
        maps = layer._similar(x.flatten(0, 1)) if number == "0" else x.flatten(0, 1)
        read = (maps - layer.mean[:, None, None]) / layer.deviation[:, None, None]
        channels = read.transpose(0, 1).flatten(1)
        # The stem takes them from a quarter of the pictures.
        within = 0.3 if number == "0" else 1e-3
        assert channels.mean(1).abs().max() < within
        assert (channels.std(1) - 1).abs().max() < within
        x = layer(x)


def test_first_weights_from_data_are_the_same_each_time_and_others_than_random_ones(
    module: Module, pictures: torch.Tensor
) -> None:
    random = {name: value.clone() for name, value in module.state_dict().items()}
    first = {name: value.clone() for name, value in begun(module, pictures).state_dict().items()}
    again = begun(convnet(OPTIONS, 3).build(range(3), 0, "cpu"), pictures).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name.split(".")[-1] for name in first if not torch.equal(first[name], random[name])}
    assert changed == {"filters", "shift", "mean", "deviation"}


def test_the_stem_compares_patches_of_mean_0_and_equal_contrast(module: Module, pictures: torch.Tensor) -> None:
    stem, whole = begun(module, pictures).layers["0"], pictures.flatten(0, 1)
    patches = whole.unfold(2, 6, 1).unfold(3, 6, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
    patches = patches - patches.mean(3, keepdim=True)
    patches = patches / (patches.square().mean(3, keepdim=True) + FLAT).sqrt()
    similar = torch.relu(patches @ stem.filters.T + stem.shift).movedim(3, 1)
    expected = torch.nn.functional.avg_pool2d(similar, 5, 3)
    assert torch.allclose(stem._similar(whole), expected, atol=1e-5)
    assert 0.1 < (similar > 0).float().mean() < 0.5  # half a deviation above the mean of all filters


def test_every_kind_of_patch_has_a_centre() -> None:
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 108, generator=rng).double()
    points = kinds[torch.arange(1000) % 4] + 0.5 * torch.randn(1000, 108, generator=rng).double()
    centres = _centres(points, 16, np.random.default_rng(0))
    alike = centres @ torch.nn.functional.normalize(kinds).T
    assert alike.max(0).values.min() > 0.97  # of single points about 0.89
    assert torch.allclose(centres.norm(dim=1), torch.ones(16, dtype=torch.float64))


def test_filters_are_unlike_each_other_as_whitening_makes_them(pictures: torch.Tensor) -> None:
    """Patches of neighbouring pixels that are alike: the centres of raw ones are smooth."""
    module = begun(convnet(NetOptions(name="convnet", width=64, blocks=(1,)), 3).build(range(1), 0, "cpu"), pictures)
    filters = torch.nn.functional.normalize(module.layers["0"].filters)
    rough = (filters[:, 1:] - filters[:, :-1]).square().sum(1)
    raw = pictures.flatten(0, 1).unfold(2, 6, 1).unfold(3, 6, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)[:, ::9, ::9]
    raw = _centres(raw.flatten(0, 2) - raw.flatten(0, 2).mean(1, keepdim=True), 32, np.random.default_rng(0))
    assert rough.mean() > 2 * (raw[:, 1:] - raw[:, :-1]).square().sum(1).mean()


def test_a_picture_gives_the_same_alone_and_among_others(module: Module, pictures: torch.Tensor) -> None:
    module = begun(module, pictures).eval()
    among = module(pictures, ONE)[1]
    alone = module(pictures[7:8], ONE[:1])[1]
    assert torch.allclose(among[7:8], alone, atol=1e-5)


def test_a_picture_and_its_mirror_image_give_the_same_where_they_are_to(pictures: torch.Tensor) -> None:
    plain = begun(convnet(OPTIONS, 3).build(range(1), 0, "cpu"), pictures)
    mirrored = begun(convnet(OPTIONS.model_copy(update={"mirrored": True}), 3).build(range(1), 0, "cpu"), pictures)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in mirrored.state_dict().items())
    image = pictures.flip(4)
    one, other = plain(pictures, ONE)[1], plain(image, ONE)[1]
    assert not torch.allclose(one, other, atol=0.1)
    torch.testing.assert_close(mirrored(pictures, ONE)[1], (one + other) / 2)
    torch.testing.assert_close(mirrored(image, ONE)[1], mirrored(pictures, ONE)[1])


def test_a_wide_network_has_no_more_patches_than_a_convolution_can_use() -> None:
    stem = convnet(NetOptions(name="convnet", width=400, blocks=(1,)), 3).build(range(1), 0, "cpu").layers["0"]
    assert (len(stem.filters), len(stem.weight)) == (128, 400)


def test_each_convolution_adds_its_channels_and_modules_halve_maps_of_eight_places_or_more() -> None:
    network = convnet(NetOptions(name="convnet", width=8, blocks=(1, 2, 1)), 3)
    assert network.natural_cut == (1, 2, 1)
    x, shapes = torch.zeros(1, 1, 3, 32, 32), []
    for layers in network.natural_ranges:
        x = network.build(layers, 0, "cpu")(x, ONE[:1])[1]
        shapes.append(tuple(x.shape[2:]))
    assert shapes == [(12, 4, 4), (28, 4, 4), (36, 4, 4)]


def test_what_a_module_reads_is_a_part_of_what_it_gives(module: Module, pictures: torch.Tensor) -> None:
    below, above = begun(module, pictures).layers["0"], module.layers["1"]
    x = below(pictures)
    assert torch.equal(above(x)[:, :, : x.shape[2]], x)
    halved = MapConvolution(3, 4, halves=True).of_maps(pictures[:, 0, :, :9, :9])
    assert halved.shape[2:] == (5, 5)
    torch.testing.assert_close(halved[:, :3, 0, 0], pictures[:, 0, :, :2, :2].mean((2, 3)))


def test_what_a_convolution_adds_is_halved_by_means_over_4_x_4_places(pictures: torch.Tensor) -> None:
    layer, maps = MapConvolution(3, 4, halves=True), pictures[:, 0, :, :8, :8]
    small = MapConvolution(3, 4, halves=False)
    small.load_state_dict(layer.state_dict())
    whole, halved = small.of_maps(maps)[:, 3:], layer.of_maps(maps)[:, 3:]
    assert halved.shape[2:] == (4, 4)
    torch.testing.assert_close(halved[:, :, 1, 2], whole[:, :, 1:5, 3:7].mean((2, 3)))
    torch.testing.assert_close(halved[:, :, 0, 3], whole[:, :, :3, 5:].sum((2, 3)) / 16)


def test_a_place_sees_the_pixels_around_it_alone() -> None:
    network = convnet(NetOptions(name="convnet", width=8, blocks=(1,)), 3)
    seen = rows_seen(network, range(1), (3, 48, 48))
    # Four rows of a convolution of three, of means over five, of patches of six, the stem's places three pixels apart.
    assert seen.sum(1).max() == 3 * (4 + 3 - 1 - 1) + 5 + 6 - 1
    assert not seen[0, 24:].any()


def test_an_offset_of_the_pictures_changes_nothing(module: Module, pictures: torch.Tensor) -> None:
    stem, x = begun(module, pictures).layers["0"], pictures.flatten(0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(stem._similar(x + 100), stem._similar(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"name": "convnet", "width": 3}, {"centred": True, "width": 1}])
def test_too_few_filters_to_be_centred_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="width must be at least"):
        NetOptions(**options)

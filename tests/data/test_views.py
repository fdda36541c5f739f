"""More views of the same data: plain, other, and the same however they are read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from layerwise.config import Config
from layerwise.data.images import PatchOptions, open_images
from layerwise.data.source import DataSet
from layerwise.data.views import NOISE_BLOCK, WithViews

Planned = Callable[..., tuple[Config, object]]


@pytest.fixture(scope="module", params=["speech", "vision"])
def noise(request: pytest.FixtureRequest, planned_stages: Planned, noise_data: Callable[..., DataSet]) -> DataSet:
    return noise_data(planned_stages(request.param)[0])


def test_the_first_view_is_plain_and_the_others_differ_from_it_and_from_each_other(noise: DataSet) -> None:
    more = WithViews(noise, 4)
    read = [more.read(3, 0, 9, view) for view in range(4)]
    assert torch.equal(read[0], noise.read(3, 0, 9))
    for one in range(4):
        for other in range(one):
            assert not torch.allclose(read[one], read[other], atol=1e-3)
    assert all(
        torch.isfinite(view).all() and view.shape == read[0].shape and view.dtype == torch.float32 for view in read
    )


def test_it_is_another_data_set_with_the_rest_as_it_was(noise: DataSet) -> None:
    more = WithViews(noise, 4)
    assert more.identity not in (noise.identity, WithViews(noise, 3).identity)
    assert (more.views, more.columns, more.frame_shape) == (4, noise.columns, noise.frame_shape)
    assert np.array_equal(more.lengths, noise.lengths)


def test_views_of_pictures_are_shifted_by_less_than_a_patch_is_apart_and_go_on_mirrored(tmp_path: Path) -> None:
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
    plain = open_images(tmp_path, PatchOptions(picture=16, patch=8, patch_stride=4, gray=False, flip=True))
    more = WithViews(plain, 24)
    assert all(torch.equal(more.read(0, 0, 9, view), plain.read(0, 0, 9, view)) for view in range(2))
    shifts = [(top, left) for top in range(-2, 2) for left in range(-2, 2)]
    for base in range(2):
        whole = plain.read_crop(0, 0, 0, (3, 3), base)[[0, 2, 6, 8]].reshape(2, 2, 3, 8, 8)
        picture = whole.permute(2, 0, 3, 1, 4).reshape(3, 16, 16).numpy()
        around = np.pad(picture, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        seen = set()
        for view in range(2 + base, 24, 2):
            read = more.read(0, 0, 9, view)
            assert torch.equal(read[3:5], more.read(0, 3, 5, view))
            assert torch.equal(read[4:5], more.read_crop(0, 4, 4, (1, 1), view))
            (shift,) = (
                (top, left)
                for top, left in shifts
                if np.array_equal(around[:, top + 2 : top + 10, left + 2 : left + 10], read[0].numpy())
            )
            top, left = shift[0] + 2, shift[1] + 2
            assert np.array_equal(around[:, top + 8 : top + 16, left + 8 : left + 16], read[8].numpy())
            seen.add(shift)
        assert len(seen) > 5


@given(start=st.integers(0, 6400), count=st.integers(0, 6400), view=st.integers(0, 3))
def test_a_part_is_read_as_it_stands_in_the_whole(
    planned_stages: Planned, noise_data: Callable[..., DataSet], start: int, count: int, view: int
) -> None:
    more = WithViews(noise_data(planned_stages("speech")[0]), 4)
    whole = more.read(5, 0, 6400, view)
    assert NOISE_BLOCK < 6400
    assert torch.equal(more.read(5, start, min(start + count, 6400), view), whole[start : start + count])

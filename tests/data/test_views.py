"""More views of the same data: plain, other, and the same however they are read."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.config import Config
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


@given(start=st.integers(0, 6400), count=st.integers(0, 6400), view=st.integers(0, 3))
def test_a_part_is_read_as_it_stands_in_the_whole(
    planned_stages: Planned, noise_data: Callable[..., DataSet], start: int, count: int, view: int
) -> None:
    more = WithViews(noise_data(planned_stages("speech")[0]), 4)
    whole = more.read(5, 0, 6400, view)
    assert NOISE_BLOCK < 6400
    assert torch.equal(more.read(5, start, min(start + count, 6400), view), whole[start : start + count])

"""Several renderings of a sample in one batch, and what a whole sample is rendered to."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.data.batches import Window, ordered_epoch, stream, training_epoch
from layerwise.data.views import cropped


class Extent:
    columns = 1

    def __init__(self, views: int) -> None:
        self.views, self.lengths = views, np.ones(9, dtype=np.int64)


@given(st.integers(2, 5), st.integers(1, 4), st.booleans())
def test_neighbouring_windows_show_one_sample_in_two_views(views: int, pairs: int, training: bool) -> None:
    make = training_epoch if training else ordered_epoch
    epoch = make(Extent(views), np.arange(9), Window(1, 1), 2 * pairs, np.random.default_rng(0), renderings=2)
    assert (epoch.samples[::2] == epoch.samples[1::2]).all()
    assert (epoch.views[::2] != epoch.views[1::2]).all()
    assert epoch.views.max() < views
    assert len(set(epoch.samples[::2])) == len(epoch.samples) // 2
    if not training:
        assert len(epoch.samples) == 18


def test_one_rendering_is_drawn_as_before() -> None:
    epoch = training_epoch(Extent(3), np.arange(9), Window(1, 1), 4, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    assert epoch.samples.tolist() == rng.permutation(np.arange(9))[:8].tolist()
    assert epoch.views.tolist() == rng.integers(0, 3, size=8).tolist()


@pytest.mark.parametrize("shape", [(4,), (2, 30), (3, 12, 16), (1, 8, 9, 10), (1, 4, 4, 4, 4)])
def test_a_rendering_keeps_the_shape_and_is_the_same_at_every_call(shape: tuple[int, ...]) -> None:
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    first, again = (cropped(sample, True, stream(0, "view", 1, "name")) for _ in range(2))
    other = cropped(sample, True, stream(0, "view", 2, "name"))
    assert first.shape == sample.shape
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert first.isfinite().all()


def test_without_flip_nothing_is_mirrored() -> None:
    ramp = torch.arange(64.0).expand(1, 64)
    rendered = [cropped(ramp, False, stream(0, "view", view, "ramp")) for view in range(40)]
    assert all(float(each[0, -8:].mean()) > float(each[0, :8].mean()) for each in rendered)

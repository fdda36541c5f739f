"""int8 with a scale per channel and group of rows."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from small_cache import layout, read_all, rows_of, write

from layerwise.cache import ActivationCache, CacheWriter
from layerwise.cache.dtypes import dequantise, quantise

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=200, deadline=None)
@given(rows=arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=4, max_side=6), elements=FLOATS))
def test_an_error_is_at_most_half_a_scale(rows: np.ndarray) -> None:
    stored, scales = quantise(rows)
    back = dequantise(stored, scales[None], 0, len(rows))
    channels = np.moveaxis(rows, 1, -1).reshape(-1, rows.shape[1])
    largest = np.abs(channels).max(0)
    faint = largest < 127 * np.finfo(np.float32).tiny
    assert np.allclose(scales, np.where(faint, 1, largest / 127), rtol=1e-6)
    errors = np.abs(np.moveaxis(back - rows, 1, -1).reshape(-1, rows.shape[1]))
    assert (errors <= np.where(faint, largest, 0.5001 * scales)).all()
    assert back.dtype == np.float32


def test_each_channel_of_each_group_has_its_own_scale(tmp_path: Path) -> None:
    a_layout = layout([7, 4], "int8", scale_rows=4)
    rows = torch.zeros(11, 3)
    rows[:, 1] = torch.arange(11)
    rows[9:, 2] = -1000
    write(tmp_path / "c.h5", a_layout, rows)
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["activations"].dtype == np.int8
        expected = np.array([[1, 3 / 127, 1], [1, 7 / 127, 1], [1, 10 / 127, 1000 / 127]])
        assert np.allclose(file["scales"][:], expected)
    assert (read_all(tmp_path / "c.h5") - rows).abs().max() < 0.04


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    scale_rows=st.integers(1, 20),
    views=st.integers(1, 2),
    append_bytes=st.integers(1, 300),
)
def test_any_window_is_what_the_whole_gives(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], scale_rows: int, views: int, append_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("windows") / "c.h5"
    a_layout = layout(lengths, "int8", views, block_bytes=16, scale_rows=scale_rows)
    rows = rows_of(a_layout)
    write(path, a_layout, rows, append_bytes=append_bytes)
    whole = torch.cat(
        [
            torch.from_numpy(dequantise(*_quantised(group), 0, scale_rows))
            for group in np.split(rows.numpy(), range(scale_rows, len(rows), scale_rows))
        ]
    )
    with ActivationCache(path) as cache:
        for sample, length in enumerate(lengths):
            for view in range(views):
                first = int(a_layout.offsets[sample * views + view])
                for start in range(0, length, 3):
                    window = cache.read(sample, start, length, view)
                    assert torch.equal(window, whole[first + start : first + length])


def test_frames_of_pictures_have_channels_first(tmp_path: Path) -> None:
    rows = torch.randn(6, 3, 2, 2) * torch.tensor([1, 10, 100]).reshape(3, 1, 1)
    stored, scales = quantise(rows.numpy())
    assert scales.shape == (3,)
    assert np.abs(stored).max(axis=(0, 2, 3)).tolist() == [127, 127, 127]


def test_rows_done_goes_back_to_the_beginning_of_a_group(tmp_path: Path) -> None:
    a_layout = layout([100], "int8", block_bytes=16, scale_rows=10)
    with CacheWriter(tmp_path / "c.h5", a_layout, append_bytes=16) as writer:
        writer.write(rows_of(a_layout)[:57].numpy())
    assert writer.rows_done == 40  # 50 rows of 3 bytes are 9 whole blocks of 16 bytes, which end in row 48


def _quantised(group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stored, scales = quantise(group)
    return stored, scales[None]

"""Windows: drawn anew in every epoch, the same in every repetition, padded where a sample is shorter."""

import time
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.data.batches import (
    Window,
    collate,
    group_renderings,
    ordered_epoch,
    read_ahead,
    read_piece,
    stream,
    training_epoch,
)
from layerwise.data.images import PatchOptions, cut_patches, normalise, picture_set


class Counting:
    """A source whose frame f of sample s in view v is s * 10000 + v * 1000 + f."""

    frame_shape = (1,)

    def __init__(self, lengths: list[int], columns: int = 1, views: int = 1) -> None:
        self.ids = [str(number) for number in range(len(lengths))]
        self.lengths = np.array(lengths, dtype=np.int64)
        self.columns, self.views, self.labels = columns, views, {}

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        assert 0 <= start <= stop <= self.lengths[sample]
        return torch.arange(start, stop, dtype=torch.float32)[:, None] + sample * 10_000 + view * 1000


def test_an_epoch_is_a_function_of_its_stream() -> None:
    source = Counting([50, 60, 70, 80, 90])

    def frames(seed: int) -> list[torch.Tensor]:
        epoch = training_epoch(source, np.arange(5), Window(20, 1), 2, stream(seed, "epoch", 1, 1))
        return [epoch.read(source, step).frames for step in range(epoch.steps)]

    assert all(torch.equal(one, other) for one, other in zip(frames(3), frames(3), strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(frames(3), frames(4), strict=True))


def test_a_source_on_a_disk_is_told_of_the_very_frames_that_a_batch_reads() -> None:
    class OnDisk(Together):
        def __init__(self, lengths: list[int], columns: int, views: int) -> None:
            super().__init__(lengths, columns, views)
            self.expected: list[tuple[int, ...]] = []
            self.asked_for: list[tuple[int, ...]] = []

        def expect(self, windows: Iterable[tuple[int, ...]]) -> None:
            self.expected.extend(windows)

        def read(self, *place: int) -> torch.Tensor:
            self.asked_for.append(place)
            return super().read(*place)

    source = OnDisk([36, 12, 60, 24], columns=6, views=2)
    epoch = training_epoch(source, np.arange(4), Window(4, 3), 2, np.random.default_rng(0))
    for step in range(epoch.steps):
        epoch.expect(source, step)
        epoch.read(source, step)
    assert source.expected == source.asked_for
    assert len(source.expected) == 4


def test_every_sample_is_seen_once_but_for_a_last_batch_that_is_not_full() -> None:
    source = Counting([30] * 7)
    epoch = training_epoch(source, np.arange(7), Window(10, 1), 3, np.random.default_rng(0))
    seen = np.concatenate([epoch.read(source, step).frames[:, 0, 0].numpy() // 10_000 for step in range(epoch.steps)])
    assert epoch.steps == 2
    assert len(set(seen.tolist())) == 6


def test_fewer_samples_than_a_batch_still_make_a_batch() -> None:
    source = Counting([30, 30])
    epoch = training_epoch(source, np.arange(2), Window(10, 1), 8, np.random.default_rng(0))
    assert epoch.steps == 1
    assert epoch.read(source, 0).frames.shape == (2, 10, 1)


def test_held_out_samples_are_all_seen() -> None:
    source = Counting([30] * 5)
    epoch = ordered_epoch(source, np.arange(5), Window(10, 1), 2, np.random.default_rng(0))
    seen = [int(first) // 10_000 for step in range(3) for first in epoch.read(source, step).frames[:, 0, 0]]
    assert seen == [0, 1, 2, 3, 4]


def test_short_samples_are_padded_and_their_lengths_told() -> None:
    source = Counting([4, 30])
    epoch = ordered_epoch(source, np.arange(2), Window(10, 1), 2, np.random.default_rng(0))
    batch = epoch.read(source, 0)
    assert batch.lengths.tolist() == [4, 10]
    assert batch.frames[0, :, 0].tolist() == [0, 1, 2, 3] + [0] * 6


def test_a_window_of_a_grid_is_a_sub_grid() -> None:
    source = Counting([35], columns=5)
    for seed in range(20):
        epoch = ordered_epoch(source, np.array([0]), Window(3, 2), 1, np.random.default_rng(seed))
        grid = epoch.read(source, 0).frames.reshape(3, 2).numpy()
        assert (np.diff(grid, axis=0) == 5).all()
        assert (np.diff(grid, axis=1) == 1).all()


def test_windows_of_pictures_begin_at_any_pixel_and_repeat_themselves() -> None:
    pixels = torch.arange(12 * 12, dtype=torch.uint8).reshape(1, 12, 12)
    pictures = picture_set(lambda sample: pixels, PatchOptions(12, 4, 4, gray=True, flip=True), ["a", "b"], "", {})
    places = set()
    for seed in range(60):
        epoch = training_epoch(pictures, np.arange(2), Window(2, 2), 2, np.random.default_rng(seed))
        again = training_epoch(pictures, np.arange(2), Window(2, 2), 2, np.random.default_rng(seed))
        batch = epoch.read(pictures, 0)
        assert torch.equal(batch.frames, again.read(pictures, 0).frames)
        assert batch.lengths.tolist() == epoch.lengths_of(pictures, 0).tolist() == [4, 4]
        for window, top, left, view in zip(batch.frames, epoch.tops, epoch.lefts, epoch.views, strict=True):
            part = (pixels.flip(-1) if view else pixels)[:, top : top + 8, left : left + 8]
            assert torch.equal(window, cut_patches(normalise(part), 4, 4))
            places.add((int(top), int(left)))
    assert places == {(top, left) for top in range(5) for left in range(5)}


class Together(Counting):
    """The same, for batches."""

    reading_threads = 2

    def expect(self, windows: Iterable[tuple[int, ...]]) -> None:
        pass

    def read_batch(self, windows: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([self.read(*window) for window in windows], batch_first=True)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    columns=st.integers(1, 4),
    window=st.tuples(st.integers(1, 6), st.integers(1, 5)),
    views=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_a_source_that_reads_batches_gives_the_batches_of_one_that_does_not(
    rows: list[int], columns: int, window: tuple[int, int], views: int, seed: int
) -> None:
    one_by_one, together = (kind([columns * count for count in rows], columns, views) for kind in (Counting, Together))
    epoch = training_epoch(one_by_one, np.arange(len(rows)), Window(*window), 3, np.random.default_rng(seed))
    for step in range(epoch.steps):
        ours, theirs = epoch.read(together, step), epoch.read(one_by_one, step)
        assert torch.equal(ours.frames, theirs.frames)
        assert ours.lengths.tolist() == theirs.lengths.tolist()
    for group in group_renderings(one_by_one.lengths, 20, views):
        for start in group.starts:
            ours, theirs = read_piece(together, group, start), read_piece(one_by_one, group, start)
            assert torch.equal(ours.frames, theirs.frames)
            assert ours.lengths.tolist() == theirs.lengths.tolist()


def test_windows_reach_every_place_and_view() -> None:
    source = Counting([12], views=3)
    firsts = set()
    for seed in range(300):
        epoch = training_epoch(source, np.array([0]), Window(10, 1), 1, np.random.default_rng(seed))
        firsts.add(int(epoch.read(source, 0).frames[0, 0, 0]))
    assert firsts == {view * 1000 + start for view in range(3) for start in range(3)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_batches_keep_the_dtype(dtype: torch.dtype) -> None:
    windows = [torch.arange(6, dtype=dtype).reshape(3, 2), torch.ones(1, 2, dtype=dtype)]
    batch = collate(windows)
    assert batch.frames.dtype == dtype
    assert torch.equal(batch.frames[0], windows[0])
    assert batch.frames[1].tolist() == [[1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("threads", [1, 2])
def test_reading_ahead_keeps_the_order_and_passes_errors_on(threads: int) -> None:
    def later_ones_are_faster(number: int) -> int:
        time.sleep(0.001 * (20 - number))
        return number

    assert list(read_ahead((partial(later_ones_are_faster, n) for n in range(20)), threads)) == list(range(20))
    results = read_ahead([lambda: 1, lambda: 1 // 0, lambda: 2], threads)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("threads", [1, 2])
def test_reading_ahead_may_be_left_early(threads: int) -> None:
    results = read_ahead(((lambda n=n: n) for n in range(1000)), threads)
    assert next(results) == 0
    results.close()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    views=st.integers(1, 2),
    more=st.integers(0, 1),
    piece=st.integers(1, 60),
)
def test_groups_cover_everything_once_and_never_hold_more_than_a_piece(
    lengths: list[int], views: int, more: int, piece: int
) -> None:
    """more: views that the samples have and that nobody asks for."""
    source = Counting(lengths, views=views + more)
    renderings = np.repeat(source.lengths, views)
    groups = group_renderings(source.lengths, piece, views)
    assert [group.first for group in groups[1:]] == [group.stop for group in groups[:-1]]
    assert (groups[0].first, groups[-1].stop) == (0, len(renderings))
    frames = 0
    for group in groups:
        for start in group.starts:
            batch = read_piece(source, group, start)
            assert batch.frames.shape[0] * batch.frames.shape[1] <= piece
            frames += int(batch.lengths.sum())
    assert frames == renderings.sum()


@given(st.integers(0, 100), st.integers(0, 100))
def test_streams_of_different_keys_differ(one: int, other: int) -> None:
    draws = {
        key: tuple(stream(1, *key).integers(0, 2**60, 2).tolist())
        for key in {(one,), (other,), (one, 0), (0, one), ("a", one), ("b", one), (one, other, 0)}
    }
    assert len(set(draws.values())) == len(draws)

"""Batches of a source: windows that are drawn at read time, and whole samples in groups that fit the device.

An epoch of windows is planned before it begins, from the seed alone, so a resume continues with the very next batch. Windows
are new crops of full-length samples in every epoch: of pictures from any pixel on, of what is cached from any frame on. Samples
shorter than the window are padded with zeros, and their real lengths go along. A thread reads ahead while the device works;
several do where the source gains from it.

For whole samples, neighbouring short ones share a padded batch, and a sample longer than a piece is read piece by piece.
Groups depend on lengths alone, so that a pass which continues after a kill sees the same batches.
"""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar, cast

import numpy as np
import torch

from layerwise.data.source import Crops, Extent, OnDisk, Place, Readable, pixels_apart

T = TypeVar("T")

READ_AHEAD = 2
"""Batches that are read before they are asked for."""


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """Random numbers as a function of the seed and of what they are for, so that a resume repeats them on any machine."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    # numpy pads the entropy with zeros, so without the length (1,) and (1, 0) would be the same stream.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(words), *words])))


@dataclass(frozen=True, slots=True)
class Window:
    """Size of a window, in rows and columns of frames of the stage's input."""

    rows: int
    columns: int

    @property
    def frames(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows on the host."""

    frames: torch.Tensor
    """CPU tensor [B, L, *frame shape] of the source's dtype, zero behind the real frames."""
    lengths: np.ndarray
    """int64 [B], real frames of each window."""
    classes: np.ndarray | None = None
    """int64 [B], for objectives that learn a label; -1 where a sample has none."""
    renderings: np.ndarray | None = None
    """int64 [B], which renderings of a group a piece is of, in order; None: all of them."""
    rows: torch.Tensor | None = None
    """Of the device, [R, *frame shape]: `frames`, int64 [B, L, 1] then, are numbers of them; None: they are what was read."""
    drawn: object = None
    """What whoever takes a step with it has drawn for it ahead; None: nothing."""


def gathered(frames: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """[B, L, *frame shape], what some frames of a batch stand for, on the device: rows with these numbers, or themselves."""
    if rows is None:
        return frames
    return rows.index_select(0, frames.flatten()).unflatten(0, frames.shape[:2])


@dataclass(frozen=True, slots=True)
class Epoch:
    """Which windows are read, in which order; row i of each array is one window."""

    samples: np.ndarray
    views: np.ndarray
    tops: np.ndarray
    lefts: np.ndarray
    """Where windows begin, in places: `apart` of them from one frame to the next."""
    window: Window
    batch_size: int
    apart: int = 1
    """Above 1, places are pixels, and windows are crops of pictures."""

    @property
    def first_rows(self) -> np.ndarray:
        """int64, of frames, one for each window."""
        return self.tops // self.apart

    @property
    def steps(self) -> int:
        """Number of batches."""
        return -(-len(self.samples) // self.batch_size)

    def samples_of(self, step: int) -> np.ndarray:
        """int64 [B], the samples of one step."""
        return self.samples[self.rows_of(step)]

    def lengths_of(self, extent: Extent, step: int) -> np.ndarray:
        """int64 [B], real frames of the windows of one step, which are not read for it."""
        _, start, stop, _ = np.array(list(self._places(extent, step))).T
        return (stop - start) // extent.columns * min(self.window.columns, extent.columns)

    def rows_of(self, step: int, share: slice = slice(None)) -> slice:
        """Where the windows of one step, or a share of them, stand among all."""
        first = step * self.batch_size
        start, stop, _ = share.indices(min(self.batch_size, len(self.samples) - first))
        return slice(first + start, first + stop)

    def read(self, source: Readable, step: int, share: slice = slice(None)) -> Batch:
        """The batch of one step, or a share of its windows alone."""
        if self.apart > 1:
            return self._read_crops(cast(Crops, source), self.rows_of(step, share))
        places = list(self._places(source, step, share))
        if self.window.columns >= source.columns:
            return read_windows(source, places)
        first_columns = self.lefts[self.rows_of(step, share)].tolist()
        return collate(
            [
                _cut_columns(frames, source.columns, first_column, self.window.columns)
                for frames, first_column in zip(_each(source, places), first_columns, strict=True)
            ]
        )

    def _read_crops(self, source: Crops, rows: slice) -> Batch:
        side = self.window.rows, self.window.columns
        places = zip(*(each[rows].tolist() for each in (self.samples, self.tops, self.lefts, self.views)), strict=True)
        return collate([source.read_crop(sample, top, left, side, view) for sample, top, left, view in places])

    def expect(self, source: Readable, step: int, share: slice = slice(None)) -> None:
        """Tells a source that lies on a disk what `read` will want of it."""
        if isinstance(source, OnDisk):
            source.expect(self._places(source, step, share))

    def _places(self, extent: Extent, step: int, share: slice = slice(None)) -> Iterator[Place]:
        rows = self.rows_of(step, share)
        samples = self.samples[rows]
        starts = self.first_rows[rows] * extent.columns
        stops = np.minimum(starts + self.window.rows * extent.columns, extent.lengths[samples])
        return zip(samples.tolist(), starts.tolist(), stops.tolist(), self.views[rows].tolist(), strict=True)


def training_epoch(
    extent: Extent, samples: np.ndarray, window: Window, batch_size: int, rng: np.random.Generator, renderings: int = 1
) -> Epoch:
    """Every sample once, in random order, at a random view and place; a last batch that is not full is left out.

    renderings: neighbouring windows that show each sample, in views that differ; divides the batch size, which counts windows.
    """
    whole_batches = max(len(samples) * renderings // batch_size, 1)
    order = rng.permutation(samples)[: whole_batches * batch_size // renderings]
    return ordered_epoch(extent, order, window, batch_size, rng, renderings)


def ordered_epoch(
    extent: Extent, samples: np.ndarray, window: Window, batch_size: int, rng: np.random.Generator, renderings: int = 1
) -> Epoch:
    """Every sample once, in this order; the last batch may be smaller. Otherwise as in training."""
    windows = np.repeat(samples, renderings)
    spare_rows = np.maximum(extent.lengths[windows] // extent.columns - window.rows, 0)
    spare_columns = max(extent.columns - window.columns, 0)
    apart = pixels_apart(extent)
    return Epoch(
        windows,
        views=_draw_views(extent.views, len(windows), renderings, rng),
        tops=rng.integers(0, spare_rows * apart + 1),
        lefts=rng.integers(0, spare_columns * apart + 1, size=len(windows)),
        window=window,
        batch_size=batch_size,
        apart=apart,
    )


def read_windows(source: Readable, places: list[Place]) -> Batch:
    """Windows of a source, padded with zeros to the longest."""
    if not isinstance(source, OnDisk):
        return collate(_each(source, places))
    return Batch(source.read_batch(places), np.array([stop - start for _, start, stop, _ in places], dtype=np.int64))


def collate(windows: list[torch.Tensor]) -> Batch:
    """Windows [l, *frame shape] of several lengths as one batch, padded with zeros to the longest."""
    lengths = np.array([len(window) for window in windows], dtype=np.int64)
    frames = torch.zeros(len(windows), int(lengths.max()), *windows[0].shape[1:], dtype=windows[0].dtype)
    # Copied as bytes by numpy: a torch copy would start a second team of threads, which fights with the device's work.
    into = frames.view(torch.uint8).numpy()
    for row, window in enumerate(windows):
        into[row, : len(window)] = window.contiguous().view(torch.uint8).numpy()
    return Batch(frames, lengths)


def among_others(batch: Batch, lengths: np.ndarray, first: int) -> Batch:
    """A whole batch of windows of these lengths, of which only those from `first` on were read: the others are zero."""
    read = batch.frames
    frames = torch.zeros(len(lengths), int(lengths.max()), *read.shape[2:], dtype=read.dtype)
    own = frames[first : first + len(read), : read.shape[1]]
    own.view(torch.uint8).numpy()[:] = read.view(torch.uint8).numpy()
    return Batch(frames, lengths)


def read_ahead(jobs: Iterable[Callable[[], T]], threads: int = 1) -> Iterator[T]:
    """The results of the jobs, in order, each computed in a background thread before it is asked for.

    threads: at most READ_AHEAD + 1 can be at work at once.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _draw_views(views: int, windows: int, renderings: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [windows]; among neighbouring renderings of a sample no view occurs twice."""
    if renderings == 1:
        return rng.integers(0, views, size=windows)
    orders = rng.permuted(np.tile(np.arange(views), (windows // renderings, 1)), axis=1)
    return orders[:, :renderings].flatten()


def _each(source: Readable, places: list[Place]) -> list[torch.Tensor]:
    """Windows [l, *frame shape], each by itself."""
    if not isinstance(source, OnDisk):
        return [source.read(*place) for place in places]
    batch = source.read_batch(places)
    return [frames[: stop - start] for frames, (_, start, stop, _) in zip(batch, places, strict=True)]


def _cut_columns(frames: torch.Tensor, columns: int, first: int, count: int) -> torch.Tensor:
    """Columns first to first + count of rows of `columns` frames."""
    return frames.unflatten(0, (-1, columns))[:, first : first + count].flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Group:
    """Renderings first to stop, which pass through a module together; rendering i * views + v is sample i in view v."""

    first: int
    stop: int
    longest: int
    """Frames of the longest of them, rounded up where they go side by side: those that it lacks are zeros."""
    piece: int
    """Most frames that are on the device at once."""
    padded: bool
    """Whether they differ in length."""
    views: int = 1
    """Of each sample."""

    @property
    def streamed(self) -> bool:
        """Whether it is one long sample, read in several pieces."""
        return self.longest > self.piece

    @property
    def starts(self) -> range:
        """First frame of each piece."""
        return range(0, max(self.longest, 1), self.piece)

    def is_last(self, start: int) -> bool:
        """Whether the piece that begins at frame `start` is the last one."""
        return start + self.piece >= self.longest


def group_renderings(lengths: np.ndarray, piece: int, views: int = 1) -> list[Group]:
    """Neighbouring renderings whose padded batch has at most `piece` frames. lengths: int64 [N], of the samples; views: the
    first ones, of each."""
    lengths = np.repeat(lengths, views)
    firsts, longest = [0], 0
    for rendering, length in enumerate(lengths.tolist()):
        if rendering > firsts[-1] and max(longest, length) * (rendering - firsts[-1] + 1) > piece:
            firsts.append(rendering)
            longest = 0
        longest = max(longest, length)
    parts = [(first, stop, lengths[first:stop]) for first, stop in pairwise([*firsts, len(lengths)]) if first < stop]
    varies = len(lengths) > 0 and bool(lengths.min() < lengths.max())
    groups = []
    for first, stop, part in parts:
        longest = int(part.max())
        if varies:
            longest = max(longest, min(_rounded_up(longest), piece // (stop - first)))
        groups.append(Group(first, stop, longest, piece, bool(part.min() < longest), views))
    return groups


def _rounded_up(length: int) -> int:
    """To one of few lengths, at most an eighth longer: on a CPU a convolution is compiled anew for each shape, and that takes
    longer than the convolution."""
    step = 2 ** max(length.bit_length() - 4, 0)
    return -(-length // step) * step


def read_piece(source: Readable, group: Group, start: int) -> Batch:
    """Frames start to start + piece of each rendering of the group; zeros behind them, up to the group's length."""
    renderings = (divmod(rendering, group.views) for rendering in range(group.first, group.stop))
    stop = start + group.piece
    batch = read_windows(
        source, [(sample, start, min(stop, int(source.lengths[sample])), view) for sample, view in renderings]
    )
    return batch if group.streamed else at_length(batch, group.longest)


def at_length(batch: Batch, length: int) -> Batch:
    """The batch with zeros behind its frames, up to so many."""
    lacking = length - batch.frames.shape[1]
    if not lacking:
        return batch
    zeros = batch.frames.new_zeros(len(batch.frames), lacking, *batch.frames.shape[2:])
    return replace(batch, frames=torch.cat([batch.frames, zeros], dim=1))

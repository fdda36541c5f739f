"""What every stage reads: samples made of frames, with ids and labels. Data sets and caches both have this shape."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

Place = tuple[int, int, int, int]
"""Of a window: sample, first frame, frame behind the last one, view."""


class Extent(Protocol):
    """How many frames there are, and in which order."""

    lengths: np.ndarray
    """int64 [N], frames of each sample; a multiple of `columns`."""
    columns: int
    """Frames per row: 1 for sequences, patches per row for pictures."""
    views: int
    """Number of renderings of each sample, at least 1."""


class Readable(Extent, Protocol):
    """Frames, without their names."""

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample: CPU tensor [stop - start, *frame_shape], float32 or the cache's dtype.

        Safe to call from several threads.
        """
        ...


@runtime_checkable
class Expecting(Protocol):
    """A source that lies on a disk, and can be told what is read soon."""

    def expect(self, windows: Iterable[Place]) -> None:
        """Windows that `read` is asked for soon: the system may fetch them meanwhile.

        Returns at once, and may leave the windows unread.
        """
        ...


@runtime_checkable
class Batched(Protocol):
    """A source that reads the windows of a batch together, for less than it takes one by one."""

    reading_threads: int
    """Threads that reading gains from; 1 where Python's lock lets one read at a time."""

    def read_batch(self, windows: Sequence[Place]) -> torch.Tensor:
        """Windows as one CPU tensor [B, longest, *frame shape], zero behind the shorter ones.

        Otherwise as `read`.
        """
        ...


class FrameSource(Readable, Protocol):
    """N samples, each a run of frames.

    A sample of a sequence has one frame per row. A sample of a picture has `columns` frames (patches) per row, row after
    row. `view` picks one of several renderings of the same sample (view 0 is the plain one).
    """

    ids: Sequence[str]
    """[N] unique names."""
    frame_shape: tuple[int, ...]
    """Shape of one frame: (1,) for raw speech, (channels, height, width) for raw patches."""

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """Label name to str [N]; an empty string means that the sample has no such label."""
        ...


class DataSet(FrameSource, Protocol):
    """A FrameSource at the bottom of the network: what a user names with --data."""

    takes: str
    """What an encoder that is trained on it takes: waveforms, pictures or arrays."""
    identity: str
    """A hash that changes when the samples, their order or the way in which they are read change."""
    test: np.ndarray | None
    """bool [N], the customary test split, or None where the data set has none."""
    skipped: Sequence["Skipped"]
    """Files that could not be used, and why."""
    level: float
    """What recordings are divided by, measured on the set; 1 for pictures. To read others as those of a run, set the run's."""
    frame_label_names: tuple[str, ...]
    """Names of the labels that exist per frame, for example ("phone",)."""

    def frame_labels(self, name: str, sample: int, positions: np.ndarray) -> np.ndarray:
        """The label at each position (in raw frames, float64 [P]) of one sample: str [P]."""
        ...


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was left out, and the reason in a few words."""

    path: str
    reason: str

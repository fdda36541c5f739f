"""What every stage reads: samples made of frames, with ids and labels. Data sets and caches both have this shape."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from layerwise.errors import DataError

NAMED = 5
"""Names in a sentence about many samples."""

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


class Crops(Extent, Protocol):
    """Pictures of which a window may begin at any pixel, and not at those alone at which a patch begins."""

    pixels_apart: int
    """From one patch to the next, across and down."""

    def read_crop(self, sample: int, top: int, left: int, side: tuple[int, int], view: int = 0) -> torch.Tensor:
        """Patches of a part of a picture: CPU tensor float32 [rows * columns, *frame_shape], row after row.

        top, left: pixels of the picture above the part and to the left of it. side: rows and columns of patches. Where the part
        sticks out of the picture by less than half of it, the picture goes on mirrored. Safe to call from several threads.
        """
        ...


def pixels_apart(extent: Extent) -> int:
    """Places at which a window may begin from one frame to the next, across and down; 1 where it begins with a frame."""
    return getattr(extent, "pixels_apart", 1)


class Readable(Extent, Protocol):
    """Frames, without their names."""

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample: CPU tensor [stop - start, *frame_shape], float32 or the cache's dtype.

        Safe to call from several threads.
        """
        ...


@runtime_checkable
class OnDisk(Protocol):
    """A source that lies on a disk, as a cache does: it prefetches, and reads a batch for less than its windows one by one."""

    reading_threads: int
    """Threads that reading gains from; 1 where Python's lock lets one read at a time."""

    def expect(self, windows: Iterable[Place]) -> None:
        """Windows that `read` is asked for soon: the system may fetch them meanwhile.

        Returns at once, and may leave the windows unread.
        """
        ...

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
    """A FrameSource at the bottom of the network: what a user names with --data.

    It may have two more fields: `notes`, lines that are said at the start, and `held_out`, bool [N], the customary samples to
    stop the training by.
    """

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


class Subset:
    """Some samples of a data set, in their own order and in view 0, for passing them forward."""

    views = 1

    def __init__(self, data: DataSet, samples: np.ndarray) -> None:
        """samples: int64 [N], their numbers in the data set."""
        self.lengths, self.columns, self.frame_shape = data.lengths[samples], data.columns, data.frame_shape
        self._data, self._samples = data, samples

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample, as `Readable` says."""
        return self._data.read(int(self._samples[sample]), start, stop)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was left out, and the reason in a few words."""

    path: str
    reason: str


@dataclass(eq=False)
class SampleSet:
    """A DataSet over a function that reads it. For the fields that are not described here see DataSet."""

    takes: str
    ids: Sequence[str]
    lengths: np.ndarray
    frame_shape: tuple[int, ...]
    identity: str
    read_values: Callable[[int, int, int, int], np.ndarray]
    """Sample, start, stop and view to values [stop - start, *frame_shape], which `read` divides by the level.

    Safe to call from several threads."""
    measure_level: Callable[["SampleSet"], float] = lambda data: 1.0
    """Called when the level is first needed, unless it was set. Raises DataError where nothing can be learnt."""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    test: np.ndarray | None = None
    held_out: np.ndarray | None = None
    skipped: Sequence[Skipped] = ()
    notes: Sequence[str] = ()
    columns: int = 1
    views: int = 1
    frame_label_names: tuple[str, ...] = ()
    read_frame_labels: Callable[[str, int, np.ndarray], np.ndarray] | None = None
    _level: float | None = field(default=None, init=False)

    @property
    def level(self) -> float:
        """What values are divided by."""
        if self._level is None:
            self._level = self.measure_level(self)
        return self._level

    @level.setter
    def level(self, level: float) -> None:
        self._level = level

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample: CPU tensor float32 [stop - start, *frame_shape] at the level of the set."""
        values = np.asarray(self.read_values(sample, start, stop, view), dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(values / np.float32(self.level)))

    def frame_labels(self, name: str, sample: int, positions: np.ndarray) -> np.ndarray:
        """The label at each position, str [P]. Raises DataError where only whole samples have labels."""
        if self.read_frame_labels is None:
            raise DataError(f"These data have no label {name!r} per frame; use a label of whole samples.")
        return self.read_frame_labels(name, sample, positions)


def said_of(data: DataSet) -> list[str]:
    """Lines on data that are about to be used: its notes, and the files that were skipped."""
    what = "samples" if data.takes == "arrays" else "files"
    head = [f"{len(data.skipped)} {what} skipped:"] if data.skipped else []
    return [*getattr(data, "notes", ()), *head, *(f"  {entry.path}: {entry.reason}" for entry in data.skipped)]


def several(names: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def digest(text: str) -> str:
    """SHA-256 of a description, as hex: what `identity` holds."""
    return hashlib.sha256(text.encode()).hexdigest()


def telling_labels(data: DataSet) -> tuple[str, ...]:
    """Labels of at least two values, by which samples or frames can be told apart; in a flat folder no speaker is known."""
    of_samples = [name for name, values in data.labels.items() if len(set(values.tolist()) - {""}) > 1]
    return (*of_samples, *data.frame_label_names)

"""Reads an activation cache: windows by pread at the disk's speed, compressed or not, from any number of threads.

Only the path travels between processes: a pickled cache opens the file anew.
"""

import ctypes
import errno
import math
import os
import stat
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import index
from pathlib import Path

import numpy as np
import torch

from layerwise.cache.blocks import Blocks
from layerwise.cache.dtypes import STORED, as_tensor, dequantise
from layerwise.cache.file_io import read_table
from layerwise.cache.format import read_layout
from layerwise.cache.seal import check_seal
from layerwise.cache.structure import unusual
from layerwise.cache.zstd import PackedBlocks
from layerwise.errors import CacheError, DamagedCache, UnusableCache

_UNUSED_BATCHES = 4
"""Batches whose memory is kept while nobody holds them: the two that training reads ahead, and those around the step."""


class ActivationCache:
    """A sealed cache, open for reading; a FrameSource for the next stage. Use as a context manager, or call `close`."""

    def __init__(self, path: Path, fingerprint: str | None = None) -> None:
        """fingerprint: that its run has recorded of it; None where nobody has.

        Raises DamagedCache where anything but activations is damaged; those are checked as they are read.

        Raises UnusableCache where the file is missing, of another version, or holds what layerwise never writes, CacheError
        where it has another fingerprint, may not be read, or is compressed and zstandard is not installed.
        """
        self.path, self._descriptor = path, -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for a writer
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise UnusableCache(path, f"{path} is no file", "move it away and start the run again")
            sealed = check_seal(path, self._descriptor)
            self.layout, self._places = read_layout(path, self._descriptor)
            if fingerprint not in (None, self.layout.fingerprint):
                raise CacheError(
                    f"{path} was not made by this run (its fingerprint is {self.layout.fingerprint[:12]}, expected "
                    f"{str(fingerprint)[:12]}); move it away, and the run makes its own where it needs it."
                )
            if sealed != (self._places.activations, self._places.stored_bytes):
                raise unusual(path, "activations")
            kind = Blocks if self.layout.compression == "none" else PackedBlocks
            self._blocks = kind(path, self._descriptor, self.layout, self._places)
        except FileNotFoundError:
            raise UnusableCache(path, f"The cache {path} is missing") from None
        except OSError as error:
            self.close()
            if error.errno == errno.EIO:
                raise DamagedCache(path, f"the disk does not give it back ({error.strerror})") from None
            raise CacheError(f"{path} cannot be read: {error.strerror}.") from None
        except BaseException:
            self.close()
            raise
        # Plain integers: a window from memory takes as long as a few of numpy's look-ups.
        self._offsets = memoryview(self.layout.offsets)
        self._stored, self._quantised = STORED[self.layout.dtype], self.layout.dtype == "int8"
        self._memory = BatchMemory()
        self.reading_threads = 2 if self._blocks.together and not self._quantised else 1
        self.ids: Sequence[str] = self.layout.ids
        self.lengths, self.frame_shape = self.layout.lengths, self.layout.frame_shape
        self.columns, self.views = self.layout.columns, self.layout.views

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Frames start to stop of one sample: CPU tensor [stop - start, *frame shape] of the cache's dtype.

        int8 comes back as float32. Raises DamagedCache where a block does not match its checksum.
        """
        return as_tensor(self._read(*self._rows(sample, start, stop, view)), self._stored.tensor)

    def read_batch(self, windows: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
        """Windows (sample, start, stop, view) as one CPU tensor [B, longest, *frame shape], zero behind the shorter ones.

        Otherwise as `read`. Unless the cache is int8 or compressed, the batch is read in one go, without Python's lock, where
        layerwise was installed with a C compiler.
        """
        stretches = [self._rows(*window) for window in windows]
        longest = max((stop - first for first, stop in stretches), default=0)
        batch = self._memory.array((len(stretches), longest, *self.frame_shape), self._stored.array)
        done = 0 if self._quantised else self._blocks.read_together(stretches, batch)
        for window, (first, stop) in zip(batch[done:], stretches[done:], strict=True):
            window[: stop - first] = self._read(first, stop)
            window[stop - first :] = 0
        return as_tensor(batch, self._stored.tensor)

    def expect(self, windows: Iterable[tuple[int, int, int, int]]) -> None:
        """Has the system fetch windows (sample, start, stop, view) that are read soon, where reads wait for the disk.

        Returns at once. Those of a compressed cache are not fetched.
        """
        self._blocks.prefetch(self._rows(*window) for window in windows)

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """Label name to str [N], as objects: long labels that many samples share take no room of their own."""
        classes = {name: np.array(known, dtype=object) for name, known in self.layout.labels_classes.items()}
        return {name: classes[name][codes] for name, codes in self.layout.labels.items()}

    def frame_labels(self, name: str, sample: int) -> np.ndarray:
        """str [frames of the sample], as objects."""
        self._refuse_closed()
        first, stop = self.layout.frames[sample : sample + 2].tolist()
        codes = read_table(self.path, self._descriptor, "<i4", self._places.frame_labels[name], first, stop)
        classes = np.array(self.layout.frame_labels_classes[name], dtype=object)
        if not ((codes >= 0) & (codes < len(classes))).all():
            raise unusual(self.path, f"frame_labels/{name}")
        return classes[codes]

    def verify(self, poll: Callable[[], None] = lambda: None) -> None:
        """Compares every block with its checksum, and calls `poll` now and then, which may raise.

        Raises DamagedCache that names the first damaged block.
        """
        self._refuse_closed()
        self._blocks.check_all(poll)

    def close(self) -> None:
        """Gives the descriptor back; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "ActivationCache":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return ActivationCache, (self.path,)

    def _refuse_closed(self) -> None:
        """Another file may have the descriptor's number by now."""
        if self._descriptor < 0:
            raise ValueError(f"the cache {self.path} is closed")

    def _read(self, first: int, stop: int) -> np.ndarray:
        """Rows first to stop, as they were handed over to the writer."""
        rows = self._blocks.read(first, stop)
        return dequantise(rows, self._scales(first, stop), first, self.layout.scale_rows) if self._quantised else rows

    def _rows(self, sample: int, start: int, stop: int, view: int) -> tuple[int, int]:
        """The same frames, as rows of the activations; plain integers, whatever the caller counts with."""
        self._refuse_closed()
        place = sample * self.views + view
        known = 0 <= view < self.views and 0 <= place < len(self._offsets) - 1
        if not (known and 0 <= start <= stop <= self._offsets[place + 1] - self._offsets[place]):
            raise IndexError(f"frames {start} to {stop} of view {view} of sample {sample} are not in {self.path}")
        return index(self._offsets[place] + start), index(self._offsets[place] + stop)

    def _scales(self, first: int, stop: int) -> np.ndarray:
        """float32 [groups, C] of the groups that rows first to stop lie in."""
        first, stop = first // self.layout.scale_rows, -(-stop // self.layout.scale_rows)
        channels, place = self.layout.scales_shape[1], self._places.scales
        scales = read_table(self.path, self._descriptor, "<f4", place, first * channels, stop * channels)
        return scales.reshape(stop - first, channels)


class BatchMemory:
    """Arrays for any number of threads. The memory of one is used again once nothing refers to it any more.

    Fresh pages of the system would take several times as long as what is read into them.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_UNUSED_BATCHES)

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Contiguous, with whatever lay there before."""
        memory = self._take(math.prod(shape) * np.dtype(dtype).itemsize)
        # Arrays and tensors that share memory keep alive what lent it: not the array that they were made of, but this.
        lent = (ctypes.c_ubyte * len(memory)).from_buffer(memory)
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return np.ndarray(shape, dtype, lent)

    def _take(self, size: int) -> np.ndarray:
        """Memory that is large enough; what is too small is let go of, since later batches would not fit either."""
        while True:
            try:
                memory = self._free.pop()
            except IndexError:
                return np.empty(max(size, 1), dtype=np.uint8)
            if len(memory) >= size:
                return memory

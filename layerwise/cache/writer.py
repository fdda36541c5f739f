"""Writes an activation cache row after row, so that a kill at any moment loses at most the appends in hand.

The file bears the name NAME.part, with NAME.journal beside it, until every row is there; then it is sealed and takes its
final name, or a packed copy of it does. A later writer of the same layout goes on behind the last whole append. A thread
writes while the caller computes; the caller waits only where it is a whole append ahead of the disk.

Several processes of one machine may share the work: each writes a span of the blocks, with a journal of its own, and when all
are done one of them seals. The file ends with the bytes that one process would have written.
"""

import errno
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from layerwise.cache.appends import Appends, aligned_buffer
from layerwise.cache.dtypes import STORED, Quantiser
from layerwise.cache.format import create, read_layout, reserve, set_complete
from layerwise.cache.inventory import beside, journal_of, journals, remove_unsealed
from layerwise.cache.layout import Layout, Places, as_codes, spans
from layerwise.cache.packing import pack, packed
from layerwise.cache.seal import stamp
from layerwise.cache.zstd import require_zstandard
from layerwise.errors import CacheError
from layerwise.files import errors_of_writing, open_own, sync_folder

APPEND_BYTES = 32 * 2**20
"""Default size of what is written and synced at once. Smaller appends pay for more syncs."""

BUFFERS = 2
"""Appends in host memory: one is filled while the other is written."""


class CacheWriter:
    """Context manager. Rows go in by `write`, in order, from `rows_done` on; `seal` ends it.

    Leaving the block without `seal` waits for the appends that are whole, and keeps them for the next writer.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        append_bytes: int = APPEND_BYTES,
        compression: str = "none",
        writer: int = 0,
        writers: int = 1,
    ) -> None:
        """`append_bytes` is rounded up to whole blocks; twice as much is held in memory. compression: none, or zstd.

        writer, writers: which of how many that share the file; the first must have been there before the others come.
        Raises CacheError where the file exists, or the folder or the disk does not take it, or zstandard is not installed.
        """
        self.path, self.layout = path, layout
        self._part, self._packing = beside(path, ".part"), beside(path, ".packing")
        self._spans = spans(layout, writers)
        self._span = self._spans[writer]
        self._packs = compression == "zstd" and packed(layout) != layout
        if path.exists():
            raise CacheError(f"{path} is sealed already; delete it to write it again.")
        if self._packs:
            require_zstandard()
        with errors_of_writing(self._part, CacheError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if writer == 0:
                self._packing.unlink(missing_ok=True)
            self._places = self._claim()
            first = self._span.first
            self._appends = Appends(self._part, journal_of(path, first), layout, self._places, first)
        durable = min(self._appends.blocks * layout.block_bytes, self._span.stop_byte)
        rows_done = self.rows_done
        # The last append may end inside a row or a group of rows: the writer wants that again, and drops what it has of it.
        self._overlap = durable - rows_done * layout.row_bytes
        self._rows_left = self.rows_stop - rows_done
        self._bytes_left = self._span.stop_byte - durable
        self._group = rows_done // layout.scale_rows
        self._quantiser: Quantiser | None = None
        if layout.dtype == "int8":
            self._quantiser = Quantiser(self._rows_left, layout.frame_shape, layout.scale_rows)
        blocks = -(-append_bytes // layout.block_bytes)
        self._append_bytes = min(blocks * layout.block_bytes, self._bytes_left)
        self._thread = ThreadPoolExecutor(1, "cache-writer")
        self._queued: deque[Future[np.ndarray]] = deque()
        self._spare: list[np.ndarray] = []
        self._buffer: np.ndarray | None = None
        self._filled = 0
        self._frames_labelled = 0

    @property
    def rows_done(self) -> int:
        """Rows up to which none need come again: those of other spans, and whole appends, for int8 of whole groups."""
        layout, blocks = self.layout, self._appends.blocks
        if blocks >= self._span.stop:
            return self.rows_stop
        rows = blocks * layout.block_bytes // layout.row_bytes
        return rows // layout.scale_rows * layout.scale_rows if layout.dtype == "int8" else rows

    @property
    def rows_stop(self) -> int:
        """Behind the last row that this writer wants: all of them, where it does not share the file."""
        return self._span.stop_row

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._wait(0)
        finally:
            self._thread.shutdown()
            self._appends.close()

    def write(self, rows: np.ndarray) -> None:
        """Appends rows [n, *frame shape] as `as_array` gives them; for int8 float32, finite.

        Raises CacheError where the disk did not take these or earlier rows.
        """
        expected = self.layout.frame_shape, np.dtype(STORED[self.layout.dtype].array)
        if (rows.shape[1:], rows.dtype) != expected or len(rows) > self._rows_left:
            raise ValueError(f"{len(rows)} rows {rows.shape[1:]} {rows.dtype} do not fit into {self.layout.dtype}")
        self._wait(BUFFERS)
        self._rows_left -= len(rows)
        if self._quantiser is None:
            self._fill(rows)
            return
        for stored, scales in self._quantiser.push(rows):
            with errors_of_writing(self._part, CacheError):
                self._appends.put(self._places.scales + self._group * scales.nbytes, scales.astype("<f4"))
            self._group += 1
            self._fill(stored)

    def put_frame_labels(self, name: str, sample: int, values: np.ndarray) -> None:
        """Stores str [frames of the sample]; once for every sample, by the writer that seals. Raises CacheError."""
        codes, classes = as_codes(values)
        known = self.layout.frame_labels_classes[name]
        codes = np.array([known.index(label) for label in classes], dtype="<i4")[codes]
        self._frames_labelled += len(values)
        with errors_of_writing(self._part, CacheError):
            self._appends.put(self._places.frame_labels[name] + 4 * int(self.layout.frames[sample]), codes)

    def finish(self) -> None:
        """Waits until all rows of this writer's span are durable. Raises CacheError where some are missing."""
        if self._filled and not self._rows_left:
            self._hand_over()
        self._wait(0)
        if self._rows_left or self._appends.blocks < self._span.stop:
            raise CacheError(f"{self._part} has {self.rows_done} of {self.rows_stop} rows; start the run again.")

    def seal(self, poll: Callable[[], None] = lambda: None) -> None:
        """Ends the file and gives it its name. While it is packed, calls `poll` now and then, which may raise.

        Raises CacheError where rows are missing, or the disk does not take the packed file.
        """
        self.finish()
        layout = self.layout
        for span in self._spans:
            if span.first < span.stop and span is not self._span:
                done = self._appends.done_in(journal_of(self.path, span.first), span.first)
                if done < span.stop:
                    raise CacheError(f"{self._part} lacks blocks {done} to {span.stop}; start the run again.")
        if self._frames_labelled != int(layout.frames[-1]) * len(layout.frame_labels_classes):
            raise ValueError(f"labels of frames are missing in {self._part}")
        whole = self._packing if self._packs else self._part
        with errors_of_writing(whole, CacheError):
            if self._packs:
                pack(self._part, whole, poll)
            else:
                set_complete(whole)
                stamp(whole, self._places.activations, layout.activation_bytes)
            os.replace(whole, self.path)
            sync_folder(self.path.parent)
            remove_unsealed(self.path)

    def _claim(self) -> Places:
        """A .part file of this layout with all its room: the one that is there, or a new one. Raises OSError."""
        try:
            layout, places = self._read_part()
            is_ours = layout == self.layout
        except CacheError:
            is_ours = False
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):  # ELOOP: what lies there is shared with another name
                raise
            is_ours = False
        try:
            if not is_ours:
                # The journals go first: without them, what is left of the old file counts for nothing.
                for journal in journals(self.path):
                    journal.unlink(missing_ok=True)
                self._part.unlink(missing_ok=True)
                create(self._part, self.layout)
                _, places = self._read_part()
            # Where the file system cannot reserve, it is done by writing, and others may be at work in a shared file.
            if not is_ours or len(self._spans) == 1:
                reserve(self._part)
        except OSError:
            if not is_ours:
                self._part.unlink(missing_ok=True)
            raise
        return places

    def _read_part(self) -> tuple[Layout, Places]:
        with open_own(self._part) as file:
            return read_layout(self._part, file.fileno())

    def _fill(self, rows: np.ndarray) -> None:
        content = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        dropped = min(self._overlap, len(content))
        content, self._overlap = content[dropped:], self._overlap - dropped
        content = content[: self._bytes_left]  # what is left of the last row belongs to the next span
        self._bytes_left -= len(content)
        while len(content):
            if self._buffer is None:
                self._wait(BUFFERS - 1)
                self._buffer = self._spare.pop() if self._spare else aligned_buffer(self._append_bytes)
            count = min(len(self._buffer) - self._filled, len(content))
            self._buffer[self._filled : self._filled + count] = content[:count]
            content, self._filled = content[count:], self._filled + count
            if self._filled == len(self._buffer):
                self._hand_over()

    def _hand_over(self) -> None:
        assert self._buffer is not None
        checksums = self._appends.checksums(memoryview(self._buffer)[: self._filled])
        self._queued.append(self._thread.submit(self._append, self._buffer, self._filled, checksums))
        self._buffer, self._filled = None, 0

    def _append(self, buffer: np.ndarray, filled: int, checksums: np.ndarray) -> np.ndarray:
        self._appends.append(memoryview(buffer)[:filled], checksums)
        return buffer

    def _wait(self, most: int) -> None:
        """Until at most that many appends are queued. Raises what befell the thread."""
        while len(self._queued) > most or (self._queued and self._queued[0].done()):
            with errors_of_writing(self._part, CacheError):
                self._spare.append(self._queued.popleft().result())

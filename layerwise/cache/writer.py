"""Writes an activation cache row after row, so that a kill at any moment loses at most the block in hand.

The file bears the name NAME.part, with NAME.journal beside it, until every row is there; then its checksums and the mark
`complete` go in, it is synced and takes its final name. A later writer of the same layout goes on at the last whole block.
"""

import os
import zlib
from pathlib import Path

import h5py
import numpy as np

from layerwise.cache import journal
from layerwise.cache.format import Layout, create, data_offset, open_checked, reserve
from layerwise.errors import CacheError
from layerwise.files import sync_folder, unwritable


class CacheWriter:
    """Context manager. Rows go in by `write`, in order, from `rows_done` on; `seal` ends it.

    Leaving the block without `seal` keeps what is there for the next writer.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        """Raises CacheError where the file exists, or the folder or the disk does not take it."""
        self.path, self.layout = path, layout
        self._part = path.with_name(path.name + ".part")
        self._journal = path.with_name(path.name + ".journal")
        self._pending = bytearray()
        if path.exists():
            raise CacheError(f"{path} is sealed already; delete it to write it again.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._checksums = self._resume()
            self._data_offset = data_offset(self._part)
            self._descriptor = os.open(self._part, os.O_RDWR)
        except OSError as error:
            raise CacheError(unwritable(self._part, error)) from None

    @property
    def rows_done(self) -> int:
        """Rows that are in whole, durable blocks."""
        if len(self._checksums) == self.layout.blocks:
            return self.layout.rows
        return len(self._checksums) * self.layout.block_bytes // self.layout.row_bytes

    def __enter__(self) -> "CacheWriter":
        # The last durable block may end inside a row: the writer wants that row again, and drops what it has of it.
        self._overlap = len(self._checksums) * self.layout.block_bytes - self.rows_done * self.layout.row_bytes
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def write(self, rows: np.ndarray) -> None:
        """Appends rows [n, *frame shape] of the stored dtype. Raises CacheError where the disk does not take them."""
        if not rows.size:
            return
        content = memoryview(np.ascontiguousarray(rows)).cast("B")
        if self._overlap:
            dropped = min(self._overlap, len(content))
            content, self._overlap = content[dropped:], self._overlap - dropped
        self._pending += content
        while len(self._pending) >= self.layout.block_bytes:
            self._write_block(bytes(self._pending[: self.layout.block_bytes]))
            del self._pending[: self.layout.block_bytes]

    def seal(self) -> None:
        """Ends the file and gives it its name. Raises CacheError where rows are missing."""
        rows, row_bytes = self.layout.rows, self.layout.row_bytes
        handed_over = min(len(self._checksums) * self.layout.block_bytes + len(self._pending), rows * row_bytes)
        if handed_over < rows * row_bytes and len(self._checksums) < self.layout.blocks:
            raise CacheError(f"{self._part} has {handed_over // row_bytes} of {rows} rows; start the run again.")
        if self._pending:
            self._write_block(bytes(self._pending))
            self._pending.clear()
        try:
            with open_checked(self._part, "r+") as file:
                file["checksums"][:] = np.array(self._checksums, dtype=np.uint32)
                file.attrs.modify("complete", True)  # in place: doing it twice gives the same bytes
            os.fsync(self._descriptor)
            os.replace(self._part, self.path)
            sync_folder(self.path.parent)
            self._journal.unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(unwritable(self._part, error)) from None

    def _write_block(self, content: bytes) -> None:
        block = len(self._checksums)
        position = self._data_offset + block * self.layout.block_bytes
        checksum = zlib.crc32(content)
        try:
            _write_all(self._descriptor, content, position)
            os.fdatasync(self._descriptor)
            journal.append(self._journal, block, checksum)
        except OSError as error:
            raise CacheError(unwritable(self._part, error)) from None
        self._checksums.append(checksum)

    def _resume(self) -> list[int]:
        if self._is_ours():
            return journal.replay(self._journal)[: self.layout.blocks]
        # The journal goes first: without it, what is left of the old file counts for nothing.
        self._journal.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)
        create(self._part, self.layout)
        try:
            reserve(self._part, self.layout)
        except OSError:
            self._part.unlink()
            raise
        return []

    def _is_ours(self) -> bool:
        try:
            with h5py.File(self._part, "r", locking=False) as file:
                attrs = file.attrs
                theirs = attrs.get("fingerprint"), attrs.get("block_bytes"), attrs.get("dtype")
                return theirs == (self.layout.fingerprint, self.layout.block_bytes, self.layout.dtype)
        except OSError:
            return False


def _write_all(descriptor: int, content: bytes, position: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written

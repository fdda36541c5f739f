"""Appends to the activations of a cache that is being written: each is on the disk, whole, before it counts.

An append is a whole number of blocks (the last of the file may be shorter). Its bytes go around the page cache where the
file system lets them, which makes waiting for the disk three times as fast; then the checksums of its blocks go into their
table, everything is synced, and the journal gets its record.

The journal says which blocks are safely on the disk. One record per append, in order: number of blocks that are done by
then, CRC-32 of the checksums of the blocks appended (as they lie in the file), CRC-32 of the record. A torn record at the
end does not count.
"""

import errno
import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np

from layerwise.cache.file_io import crc32, read_stored, write_all
from layerwise.cache.format import ALIGNMENT
from layerwise.cache.layout import Layout, Places
from layerwise.files import OURS, open_own

_RECORD = struct.Struct("<QII")


def aligned_buffer(size: int) -> np.ndarray:
    """uint8 [size] at an address that O_DIRECT takes."""
    buffer = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size]


class Appends:
    """Appends one after another, from the last good one in the journal on.

    `checksums` and `append` are for one thread each, so that the one is computed while the other waits for the disk.
    """

    def __init__(self, part: Path, journal_path: Path, layout: Layout, places: Places, first: int = 0) -> None:
        """first: the block that the journal begins with. Raises OSError."""
        self._part, self._layout, self._places, self._journal = part, layout, places, journal_path
        self._descriptor = os.open(part, os.O_RDWR | OURS)
        self._direct: int | None = None
        with suppress(OSError):  # the file system does not let writes go around the page cache
            self._direct = os.open(part, os.O_WRONLY | os.O_DIRECT | OURS)
        self._failed = False
        self.blocks = self.done_in(journal_path, first)
        """Blocks that are durable, counted from the beginning of the file."""
        self._summed, self._checksum = self.blocks, 0
        if self.blocks > first:
            self._checksum = int.from_bytes(self._stored(self.blocks - 1, self.blocks), "little")

    def checksums(self, content: memoryview) -> np.ndarray:
        """uint32 [blocks] of what is appended next; asked for once for each append, in order."""
        size, chain = self._layout.block_bytes, self._layout.chain_blocks
        checksums, checksum = [], self._checksum
        for block, start in enumerate(range(0, len(content), size), self._summed):
            checksum = crc32(content[start : start + size], checksum if block % chain else 0)
            checksums.append(checksum)
        self._summed, self._checksum = self._summed + len(checksums), checksum
        return np.array(checksums, dtype="<u4")

    def append(self, content: memoryview, checksums: np.ndarray) -> None:
        """Raises OSError; after that, further appends do nothing, since the file would have a hole."""
        if self._failed:
            return
        self._failed = True  # until it is whole
        table = checksums.tobytes()
        self._write(content, self._places.activations + self.blocks * self._layout.block_bytes)
        write_all(self._descriptor, table, self._places.checksums + 4 * self.blocks)
        os.fdatasync(self._descriptor)
        self._note(_record(self.blocks + len(checksums), crc32(table)))
        self.blocks += len(checksums)
        self._failed = False

    def put(self, place: int, values: np.ndarray) -> None:
        """Stores scales or labels of frames; durable with the next append, or once the file is sealed. Raises OSError."""
        write_all(self._descriptor, values.tobytes(), place)

    def done_in(self, journal: Path, first: int) -> int:
        """The block up to which a journal has all done, from `first` on; cuts off records that are torn or of other blocks."""
        try:
            file = open_own(journal)
        except FileNotFoundError:
            return first
        done, records = first, 0
        with file:
            while len(record := file.read(_RECORD.size)) == _RECORD.size:
                blocks, checksum, _ = _RECORD.unpack(record)
                if record != _record(blocks, checksum) or blocks <= done:
                    break
                if crc32(self._stored(done, blocks)) != checksum:
                    break
                done, records = blocks, records + 1
            file.truncate(records * _RECORD.size)
        return done

    def close(self) -> None:
        """Gives the descriptors back."""
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)

    def _note(self, record: bytes) -> None:
        """Adds a durable record to the journal. Raises OSError."""
        descriptor = os.open(self._journal, os.O_WRONLY | os.O_CREAT | OURS, 0o666)
        try:
            write_all(descriptor, record, os.fstat(descriptor).st_size)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _write(self, content: memoryview, position: int) -> None:
        whole = len(content) // ALIGNMENT * ALIGNMENT if position % ALIGNMENT == 0 else 0
        if self._direct is not None and whole:
            try:
                write_all(self._direct, content[:whole], position)
                content, position = content[whole:], position + whole
            except OSError as error:
                if error.errno != errno.EINVAL:  # the file system opens such files, but does not write them
                    raise
        write_all(self._descriptor, content, position)

    def _stored(self, first: int, stop: int) -> bytes:
        """The checksums of blocks first to stop, as they lie in the file."""
        size = 4 * max(min(stop, self._layout.blocks) - first, 0)
        return read_stored(self._part, self._descriptor, self._places.checksums + 4 * first, size).tobytes()


def _record(blocks: int, checksum: int) -> bytes:
    """Of the journal: `blocks` are done by then, the last append of them with this checksum of its checksums."""
    return _RECORD.pack(blocks, checksum, crc32(_RECORD.pack(blocks, checksum, 0)[:-4]))

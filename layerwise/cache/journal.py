"""The journal of a cache that is being written: which blocks are safely on the disk.

One record per append, in order: number of blocks that are done by then, CRC-32 of the checksums of the blocks appended
(as they lie in the file), CRC-32 of the record. A record is added only after its blocks and their checksums are synced;
a torn record at the end does not count.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path

from layerwise.cache.crc import crc32
from layerwise.cache.positional import write_all

_RECORD = struct.Struct("<QI")
_CHECK = struct.Struct("<I")
_SIZE = _RECORD.size + _CHECK.size


def append(path: Path, blocks: int, checksums: bytes) -> None:
    """Adds one durable record: `blocks` are done now, the last of them with these checksums. Raises OSError."""
    record = _RECORD.pack(blocks, crc32(checksums))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        write_all(descriptor, record + _CHECK.pack(crc32(record)), os.fstat(descriptor).st_size)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def replay(path: Path, checksums: Callable[[int, int], bytes], first: int = 0) -> int:
    """The block up to which all are done from `first` on; cuts off records that are torn or belong to other blocks.

    `checksums(first, stop)` gives the bytes of the checksums in the file.
    """
    if not path.exists():
        return first
    content = path.read_bytes()
    done, records = first, 0
    for start in range(0, len(content) - _SIZE + 1, _SIZE):
        record, check = content[start : start + _RECORD.size], content[start + _RECORD.size : start + _SIZE]
        blocks, checksum = _RECORD.unpack(record)
        if check != _CHECK.pack(crc32(record)) or blocks <= done or crc32(checksums(done, blocks)) != checksum:
            break
        done, records = blocks, records + 1
    os.truncate(path, records * _SIZE)
    return done

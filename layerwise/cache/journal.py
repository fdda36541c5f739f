"""The journal of a cache that is being written: which blocks are safely on the disk, and their checksums.

One record per block in order: block number, CRC-32 of the block, CRC-32 of the record. A record is appended only after
its block is synced; a torn record at the end does not count.
"""

import os
import struct
import zlib
from pathlib import Path

_RECORD = struct.Struct("<QI")
_CHECK = struct.Struct("<I")


def append(path: Path, block: int, checksum: int) -> None:
    """Adds one durable record."""
    record = _RECORD.pack(block, checksum)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, record + _CHECK.pack(zlib.crc32(record)))
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def replay(path: Path) -> list[int]:
    """Checksums of blocks 0, 1, ... as far as the records are whole; cuts off what is torn behind them."""
    if not path.exists():
        return []
    content = path.read_bytes()
    size = _RECORD.size + _CHECK.size
    checksums: list[int] = []
    for start in range(0, len(content) - size + 1, size):
        record = content[start : start + _RECORD.size]
        block, checksum = _RECORD.unpack(record)
        (check,) = _CHECK.unpack(content[start + _RECORD.size : start + size])
        if check != zlib.crc32(record) or block != len(checksums):
            break
        checksums.append(checksum)
    os.truncate(path, len(checksums) * size)
    return checksums

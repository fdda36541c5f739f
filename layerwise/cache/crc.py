"""CRC-32, the one of zlib and PNG, through ISA-L, which is ten times as fast as zlib itself."""

from isal.isal_zlib import crc32

__all__ = ["crc32"]

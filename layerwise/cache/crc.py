"""CRC-32, the one of zlib and PNG, through ISA-L, which is ten times as fast as zlib itself."""

import ctypes

from isal import isal_zlib
from isal.isal_zlib import crc32

__all__ = ["ADDRESS", "crc32"]


def _address() -> int:
    try:
        return ctypes.cast(ctypes.CDLL(isal_zlib.__file__).crc32_gzip_refl, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


ADDRESS = _address()
"""Of the same function of ISA-L, for code in C. 0 where isal was built so that it cannot be found."""

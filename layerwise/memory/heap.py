"""The heap of the C library, kept from growing with the length of a run. Only glibc's is known to need it."""

import ctypes
from functools import cache

ARENA_MAX = -8
"""M_ARENA_MAX of glibc's malloc.h."""


def share_one_heap() -> None:
    """One heap for all threads of this process that are yet to come.

    glibc gives each thread one of its own, which keeps what the thread has freed: threads that read ahead and write
    caches, a new one for every epoch and stage, so took 40 MB more for a hundredfold data set.
    """
    heap = _glibc()
    if heap is not None:
        heap.mallopt(ARENA_MAX, 1)


def return_freed() -> None:
    """Gives the system back what nothing uses any more."""
    heap = _glibc()
    if heap is not None:
        heap.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """None where the C library is another one."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None

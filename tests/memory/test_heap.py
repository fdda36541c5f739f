"""The C library's heaps, counted by its own account of them in a process of their own."""

import ctypes
import subprocess
import sys

import pytest

COUNT_HEAPS = """
import ctypes, sys, threading
from layerwise.memory.device import share_one_heap

if sys.argv[1] == "shared":
    share_one_heap()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
together = threading.Barrier(6)

def work():
    together.wait()
    library.malloc(5000)

threads = [threading.Thread(target=work) for _ in range(5)]
for thread in threads:
    thread.start()
together.wait()
for thread in threads:
    thread.join()
library.fdopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(library.fdopen(1, b"w"))
library.malloc_info(0, file)
library.fflush(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="another C library than glibc")
def test_threads_share_one_heap() -> None:
    def heaps(how: str) -> int:
        return subprocess.run(
            [sys.executable, "-c", COUNT_HEAPS, how], check=True, capture_output=True, text=True
        ).stdout.count("<heap nr=")

    assert heaps("shared") == 1
    assert heaps("as it is") > 1

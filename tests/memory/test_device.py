"""What is offloaded comes back to the bit; a full device is told from other errors; threads share a heap."""

import ctypes
import subprocess
import sys

import pytest
import torch

from layerwise.memory.device import offloaded, why_out_of_memory
from layerwise.memory.meter import Meter

CPU = torch.device("cpu")


def test_offloaded_tensors_hold_nothing_on_the_device_and_come_back_to_the_bit() -> None:
    with Meter(CPU) as meter:
        layer = torch.nn.Linear(100, 100)
        held, before = meter.live, [parameter.detach().numpy().copy() for parameter in layer.parameters()]
        with offloaded(layer.parameters(), CPU):
            assert meter.live == 0
        assert meter.live == held
    for parameter, value in zip(layer.parameters(), before, strict=True):
        assert parameter.detach().numpy().tobytes() == value.tobytes()


def test_they_come_back_after_an_error_too() -> None:
    tensor = torch.arange(3.0)
    try:
        with offloaded([tensor], CPU):
            raise ValueError
    except ValueError:
        pass
    assert tensor.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "Unable to find an engine to execute this computation",
    ],
)
def test_what_libraries_say_where_the_device_is_full_is_known(message: str) -> None:
    assert why_out_of_memory(RuntimeError(message)) == message


def test_other_errors_are_raised_again() -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")
    with pytest.raises(RuntimeError) as raised:
        why_out_of_memory(error)
    assert raised.value is error


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

"""Speed of the activation cache against the disk itself and against plain h5py: writes, and shuffled windows.

python benchmarks/cache.py [--folder .] [--gigabytes 2] [--windows 4096] [--rounds 5]

Everything runs in one process, way after way in each round; medians over the rounds. Cold: the file's pages were dropped
before. First epoch: checksums are compared. Warm: the same windows once more, so a file larger than the memory will do.
"""

import argparse
import ctypes
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import psutil
import torch

from layerwise.cache import ActivationCache, CacheWriter, Layout
from layerwise.cache.crc import crc32
from layerwise.cache.writer import APPEND_BYTES
from layerwise.data.batches import read_ahead

CHANNELS, WINDOW, SAMPLE = 512, 128, 2048
"""Channels of a row; rows of a window, of a sample."""
ROW_BYTES = 2 * CHANNELS
PIECE = 1024
"""Rows that a caching pass hands over at once."""
BATCH = 8
"""Windows that the prefetch thread reads at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--windows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    samples = max(round(options.gigabytes * 1e9 / ROW_BYTES / SAMPLE), 1)
    layout = layout_of(samples)
    memory = psutil.virtual_memory().total
    print(
        f"{layout.activation_bytes / 1e9:.1f} GB of float16 rows of {CHANNELS}, memory {memory / 1e9:.0f} GB, "
        f"{os.cpu_count()} cores, checksums by {crc32.__module__}, medians of {options.rounds}\n"
    )
    print("| what | way | MB/s | ratio |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "cache.h5"
        measure_writes(path, layout, options.rounds)
        measure_reads(path, layout, options.windows, options.rounds)


def layout_of(samples: int) -> Layout:
    return Layout(
        fingerprint="0" * 64,
        stage=1,
        dtype="float16",
        frame_shape=(CHANNELS,),
        columns=1,
        views=1,
        lengths=np.full(samples, SAMPLE, dtype=np.int64),
        ids=tuple(str(number) for number in range(samples)),
        split=np.zeros(samples, dtype=np.uint8),
        labels={},
        frame_labels={},
        hop=1,
        offset=0.0,
    )


def measure_writes(path: Path, layout: Layout, rounds: int) -> None:
    """Prints a row for each way; the last writes the cache that `path` then holds."""
    rows = np.random.default_rng(0).integers(0, 30000, (APPEND_BYTES // ROW_BYTES, CHANNELS)).astype("<u2").view("<f2")
    raw = path.with_name("raw")
    ways: dict[str, Callable[[], None]] = {
        "os.pwrite, fsync": lambda: write_raw(raw, rows, layout, preallocate=False),
        "posix_fallocate, os.pwrite, fsync": lambda: write_raw(raw, rows, layout, preallocate=True),
        "CacheWriter": lambda: write_cache(path, rows, layout),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            raw.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            os.sync()
            seconds[name].append(timed(way))
    raw.unlink(missing_ok=True)
    speeds = {name: layout.activation_bytes / 1e6 / statistics.median(taken) for name, taken in seconds.items()}
    report("write", speeds, speeds["os.pwrite, fsync"])


def write_raw(path: Path, rows: np.ndarray, layout: Layout, preallocate: bool) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    content, size = memoryview(rows).cast("B"), layout.activation_bytes
    if preallocate:
        os.posix_fallocate(descriptor, 0, size)
    for start in range(0, size, len(content)):
        os.pwrite(descriptor, content[: size - start], start)
    os.fsync(descriptor)
    os.close(descriptor)


def write_cache(path: Path, rows: np.ndarray, layout: Layout) -> None:
    with CacheWriter(path, layout) as writer:
        for start in range(0, layout.rows, PIECE):
            first = start % len(rows)
            writer.write(rows[first : first + min(PIECE, layout.rows - start)])
        writer.seal()

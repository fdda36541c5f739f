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


def measure_reads(path: Path, layout: Layout, count: int, rounds: int) -> None:
    """Prints a row for each way, temperature and number of threads. All read the same windows in the same order."""
    rng = np.random.default_rng(1)
    windows = [
        (int(sample), int(start))
        for sample, start in zip(
            rng.permutation(np.arange(count) % len(layout.lengths)),
            rng.integers(0, SAMPLE - WINDOW + 1, count),
            strict=True,
        )
    ]
    with ActivationCache(path) as compared, h5py.File(path) as file, raw_reader(path) as raw:
        compared.verify()
        rows = file["activations"]
        batches = torch.utils.data.DataLoader(H5pyWindows(path, windows), BATCH, num_workers=2)
        one_thread: dict[str, Callable[[], None]] = {
            "os.preadv": lambda: each(raw, windows),
            "ActivationCache, first epoch": lambda: first_epoch(path, windows, each),
            "ActivationCache, later epochs": lambda: each(compared.read, windows),
            "h5py, fancy indexing": lambda: each(partial(read_fancy, rows), windows),
        }
        prefetching: dict[str, Callable[[], None]] = {
            "os.preadv": lambda: ahead(raw, windows),
            "ActivationCache, first epoch": lambda: first_epoch(path, windows, ahead),
            "ActivationCache, later epochs": lambda: ahead(compared.read, windows),
            "DataLoader over h5py, 2 workers": lambda: exhaust(batches),
        }
        for threads, ways in (("one thread", one_thread), ("a prefetch thread", prefetching)):
            seconds: dict[tuple[str, str], list[float]] = {}
            for _ in range(rounds):
                for name, way in ways.items():
                    drop_pages(path)
                    for temperature in ("cold", "warm"):
                        seconds.setdefault((temperature, name), []).append(timed(way))
            for temperature in ("cold", "warm"):
                speeds = {
                    name: count * WINDOW * ROW_BYTES / 1e6 / statistics.median(seconds[temperature, name])
                    for name in ways
                }
                report(f"read, {temperature}, {threads}", speeds, speeds["os.preadv"])


@contextmanager
def raw_reader(path: Path) -> Iterator[Callable[[int, int, int], None]]:
    """Reads the bytes of a window into always the same memory: nothing but the system call."""
    with h5py.File(path) as file:
        offset = file["activations"].id.get_offset()
    buffer = memoryview(bytearray(WINDOW * ROW_BYTES))
    descriptor = os.open(path, os.O_RDONLY)

    def read(sample: int, start: int, stop: int) -> None:
        os.preadv(descriptor, [buffer], offset + (sample * SAMPLE + start) * ROW_BYTES)

    try:
        yield read
    finally:
        os.close(descriptor)


def read_fancy(rows: h5py.Dataset, sample: int, start: int, stop: int) -> np.ndarray:
    return rows[np.arange(sample * SAMPLE + start, sample * SAMPLE + stop)]


class H5pyWindows(torch.utils.data.Dataset):
    """The usual data set over h5py: each worker opens the file, each item is a slice."""

    def __init__(self, path: Path, windows: list[tuple[int, int]]) -> None:
        self.path, self.windows, self.rows = path, windows, None

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> torch.Tensor:
        if self.rows is None:
            self.rows = h5py.File(self.path)["activations"]
        sample, start = self.windows[number]
        return torch.from_numpy(self.rows[sample * SAMPLE + start : sample * SAMPLE + start + WINDOW])


def each(read: Callable[[int, int, int], object], windows: list[tuple[int, int]]) -> None:
    for sample, start in windows:
        read(sample, start, start + WINDOW)


def ahead(read: Callable[[int, int, int], object], windows: list[tuple[int, int]]) -> None:
    """As training reads: a thread reads batches before they are asked for."""
    batches = (windows[first : first + BATCH] for first in range(0, len(windows), BATCH))
    exhaust(read_ahead(partial(each, read, batch) for batch in batches))


def first_epoch(path: Path, windows: list[tuple[int, int]], way: Callable[..., None]) -> None:
    with ActivationCache(path) as cache:
        way(cache.read, windows)


def exhaust(batches: Iterator[object]) -> None:
    for _ in batches:
        pass


def drop_pages(path: Path) -> None:
    """Out of the page cache; says so where the system keeps more than a hundredth."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped:
            pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapped)
            ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages)
            del start
    kept = float(np.frombuffer(pages, dtype=np.uint8).mean())
    if kept > 0.01:
        print(f"not cold: the system keeps {kept:.0%} of the pages")


def timed(way: Callable[[], None]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def report(what: str, speeds: dict[str, float], raw: float) -> None:
    for name, speed in speeds.items():
        print(f"| {what} | {name} | {speed:.0f} | {speed / raw:.2f} |", flush=True)


if __name__ == "__main__":
    main()

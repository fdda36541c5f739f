"""Speed of the activation cache against the disk itself and against plain h5py: writes, and shuffled windows.

python benchmarks/cache.py [--folder .] [--gigabytes 2] [--plain-gigabytes 1] [--rounds 7]

Everything runs in one process; the ways take turns, of a whole file when they write and of 256 windows when they read, in
another order each time, since a disk may be faster after a rest; speeds and ratios are medians over the turns. Cold: the
pages of the file were dropped, and no place is read twice. Warm: the same windows once more, so the file may be larger than
the memory. In the first epoch checksums are compared. Read ahead, the consumer is idle, and the cache has two threads; so has
one of the two ways of os.preadv. Ratios are against the other one, of one thread, which always reads into the same memory.
The usual h5py file may be smaller, since it is slow.
"""

import argparse
import ctypes
import mmap
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import psutil
import torch

from layerwise.cache import ActivationCache, CacheWriter, Layout
from layerwise.data.batches import read_ahead

CHANNELS, WINDOW, SAMPLE = 512, 128, 2048
"""Channels of a row; rows of a window, of a sample."""
ROW_BYTES = 2 * CHANNELS
PIECE = 1024
"""Rows that a caching pass hands over at once."""
RAW_BYTES = 32 * 2**20
"""What the raw baseline writes at once."""
BATCH = 8
"""Windows that are read ahead at once."""
TURN, TURNS = 256, 30
"""Windows of a turn, so many that what it takes to start threads is lost in it; turns at most."""
SMALLEST_GIGABYTES = 0.3
"""Each of the ways that share a file needs windows of its own for a turn."""

Window = tuple[int, int]
"""Sample, first row."""
Read = Callable[[int, int, int], object]
"""Of a sample, rows from to."""
Place = tuple[int, int, int, int]
"""Of a window: sample, rows from to, view."""


class Reader(NamedTuple):
    """One way to get at the windows."""

    read: Read
    read_batch: Callable[[list[Place]], object]
    expect: Callable[[list[Place]], object]
    threads: int = 1
    """That read ahead."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--plain-gigabytes", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="of writing")
    options = parser.parse_args()
    if min(options.gigabytes, 4 * options.plain_gigabytes) < SMALLEST_GIGABYTES:
        parser.error(f"--gigabytes has to be at least {SMALLEST_GIGABYTES}, --plain-gigabytes a quarter of it")
    layout = layout_of(options.gigabytes)
    plain_samples = min(len(layout_of(options.plain_gigabytes).lengths), len(layout.lengths))
    print(
        f"{layout.activation_bytes / 1e9:.1f} GB of float16 rows of {CHANNELS}, windows of {WINDOW} rows, memory "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB, {os.cpu_count()} cores, medians of {options.rounds} "
        f"writes and up to {TURNS} turns of reads\n\n| what | way | MB/s | ratio |\n| --- | --- | --- | --- |",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, plain = Path(folder) / "cache.h5", Path(folder) / "plain.h5"
        measure_writes(path, plain, layout, plain_samples, options.rounds)
        measure_reads(path, plain, len(layout.lengths), plain_samples)


def layout_of(gigabytes: float) -> Layout:
    samples = max(round(gigabytes * 1e9 / ROW_BYTES / SAMPLE), 1)
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
        labels_classes={},
        frame_labels_classes={},
        hop=1,
        offset=0.0,
    )


def measure_writes(path: Path, plain: Path, layout: Layout, plain_samples: int, rounds: int) -> None:
    """Leaves the cache, and the usual HDF5 file of its first samples."""
    rows = np.random.default_rng(0).integers(0, 30000, (RAW_BYTES // ROW_BYTES, CHANNELS)).astype("<u2").view("<f2")
    raw = path.with_name("raw")
    ways: dict[str, Callable[[], None]] = {
        "os.pwrite, fsync": lambda: write_raw(raw, rows, layout, preallocate=False),
        "posix_fallocate, os.pwrite, fsync": lambda: write_raw(raw, rows, layout, preallocate=True),
        "CacheWriter": lambda: write_stage_cache(path, rows, layout),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in in_turn(ways, rounds):
        raw.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        os.sync()
        seconds[name].append(timed(ways[name]))
    raw.unlink(missing_ok=True)  # else both would lie on the disk at once
    if not path.exists():  # another way came last
        write_stage_cache(path, rows, layout)
    os.sync()
    report("write", layout.activation_bytes, seconds)
    size = plain_samples * SAMPLE * ROW_BYTES
    print(
        f"| write | h5py, automatic chunks | {size / 1e6 / timed(lambda: write_plain(plain, rows, plain_samples)):.0f} | |"
    )


def write_raw(path: Path, rows: np.ndarray, layout: Layout, preallocate: bool) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    content, size = memoryview(rows).cast("B"), layout.activation_bytes
    if preallocate:
        os.posix_fallocate(descriptor, 0, size)
    for start in range(0, size, len(content)):
        os.pwrite(descriptor, content[: size - start], start)
    os.fsync(descriptor)
    os.close(descriptor)


def write_stage_cache(path: Path, rows: np.ndarray, layout: Layout) -> None:
    with CacheWriter(path, layout) as writer:
        for piece in pieces(rows, layout.rows):
            writer.write(piece)
        writer.seal()


def write_plain(path: Path, rows: np.ndarray, samples: int) -> None:
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("activations", (samples * SAMPLE, CHANNELS), "<f2", chunks=True)
        first = 0
        for piece in pieces(rows, len(stored)):
            stored[first : first + len(piece)] = piece
            first += len(piece)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def pieces(rows: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """`count` rows, the same ones again and again, as a caching pass gives them."""
    for start in range(0, count, PIECE):
        first = start % len(rows)
        yield rows[first : first + min(PIECE, count - start)]


def measure_reads(path: Path, plain: Path, samples: int, plain_samples: int) -> None:
    turns = min(TURNS, samples * SAMPLE // (2 * WINDOW) // TURN // 4, plain_samples * SAMPLE // (2 * WINDOW) // TURN)
    for how, way in (("one by one", one_by_one), ("in batches", in_batches), ("read ahead", ahead)):
        with ExitStack() as stack:
            cold_later, warm_later = (stack.enter_context(ActivationCache(path)) for _ in range(2))
            for compared in (cold_later, warm_later):
                compared.verify()
            drop_pages(path)
            drop_pages(plain)
            cold, warm = (stack.enter_context(ActivationCache(path)) for _ in range(2))  # which brings the index back
            raw = plainly(stack.enter_context(raw_reader(path)))
            fancy = plainly(partial(read_fancy, stack.enter_context(h5py.File(plain))["activations"]))
            windows, plain_windows = places(samples), places(plain_samples)
            readers: dict[str, tuple[Reader, Reader, Iterator[Window]]] = {
                "os.preadv": (raw, raw, windows),
                "ActivationCache, first epoch": (as_training(cold), as_training(warm), windows),
                "ActivationCache, later epochs": (as_training(cold_later), as_training(warm_later), windows),
                "h5py, automatic chunks, fancy indexing": (fancy, fancy, plain_windows),
            }
            if way is ahead:
                threads = cold.reading_threads
                many = raw._replace(threads=threads)
                readers[f"os.preadv, {threads} threads as the cache"] = (many, many, windows)
            seconds: dict[str, dict[str, list[float]]] = {
                temperature: {name: [] for name in readers} for temperature in ("cold", "warm")
            }
            for name in in_turn(readers, turns):
                first_time, again, some = readers[name]
                chosen = [(sample, start, start + WINDOW, 0) for sample, start in islice(some, TURN)]
                seconds["cold"][name].append(timed(partial(way, first_time, chosen)))
                seconds["warm"][name].append(timed(partial(way, again, chosen)))
            for temperature, taken in seconds.items():
                report(f"windows, {temperature}, {how}", TURN * WINDOW * ROW_BYTES, taken)
    measure_loader(plain, list(islice(places(plain_samples), turns * TURN)))


def measure_loader(plain: Path, windows: list[Window]) -> None:
    loader = torch.utils.data.DataLoader(PlainWindows(plain, windows), BATCH, num_workers=2, persistent_workers=True)
    exhaust(loader)  # starts the workers
    drop_pages(plain)
    for temperature in ("cold", "warm"):
        speed = len(windows) * WINDOW * ROW_BYTES / 1e6 / timed(partial(exhaust, loader))
        print(f"| windows, {temperature}, 2 workers | DataLoader over h5py, automatic chunks | {speed:.0f} | |")


def in_turn(names: Iterable[str], turns: int) -> Iterator[str]:
    """All of them in random order, again and again."""
    order, rng = list(names), random.Random(0)
    for _ in range(turns):
        rng.shuffle(order)
        yield from order


def places(samples: int) -> Iterator[Window]:
    """Windows all over the file, of which no two overlap."""
    rng = np.random.default_rng(0)
    slots = SAMPLE // (2 * WINDOW)
    for place in rng.permutation(samples * slots).tolist():
        yield place // slots, place % slots * 2 * WINDOW + int(rng.integers(WINDOW))


@contextmanager
def raw_reader(path: Path) -> Iterator[Read]:
    """Reads the bytes of a window into always the same memory of a thread: nothing but the system call."""
    with h5py.File(path) as file:
        offset = file["activations"].id.get_offset()
    memory = threading.local()
    descriptor = os.open(path, os.O_RDONLY)

    def read(sample: int, start: int, stop: int) -> None:
        if not hasattr(memory, "buffers"):
            memory.buffers = [bytearray(WINDOW * ROW_BYTES)]
        os.preadv(descriptor, memory.buffers, offset + (sample * SAMPLE + start) * ROW_BYTES)

    try:
        yield read
    finally:
        os.close(descriptor)


def read_fancy(rows: h5py.Dataset, sample: int, start: int, stop: int) -> np.ndarray:
    return rows[np.arange(sample * SAMPLE + start, sample * SAMPLE + stop)]


class PlainWindows(torch.utils.data.Dataset):
    """The usual data set over h5py: each worker opens the file, each item is a slice."""

    def __init__(self, path: Path, windows: list[Window]) -> None:
        self.path, self.windows, self.rows = path, windows, None

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> torch.Tensor:
        if self.rows is None:
            self.rows = h5py.File(self.path)["activations"]
        sample, start = self.windows[number]
        return torch.from_numpy(self.rows[sample * SAMPLE + start : sample * SAMPLE + start + WINDOW])


def plainly(read: Read) -> Reader:
    """What knows neither batches nor what is read soon."""

    def each(windows: list[Place]) -> None:
        for sample, start, stop, _ in windows:
            read(sample, start, stop)

    return Reader(read, each, expect=lambda windows: None)


def as_training(cache: ActivationCache) -> Reader:
    return Reader(cache.read, cache.read_batch, cache.expect, cache.reading_threads)


def one_by_one(reader: Reader, windows: list[Place]) -> None:
    """Each when its turn comes."""
    for sample, start, stop, _ in windows:
        reader.read(sample, start, stop)


def in_batches(reader: Reader, windows: list[Place]) -> None:
    """Each batch when its turn comes."""
    for batch in batches(windows):
        reader.read_batch(batch)


def ahead(reader: Reader, windows: list[Place]) -> None:
    """As training reads: batches are expected, and read before they are asked for."""

    def reads() -> Iterator[Callable[[], object]]:
        for batch in batches(windows):
            reader.expect(batch)
            yield partial(reader.read_batch, batch)

    exhaust(read_ahead(reads(), reader.threads))


def batches(windows: list[Place]) -> Iterator[list[Place]]:
    for first in range(0, len(windows), BATCH):
        yield windows[first : first + BATCH]


def exhaust(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def drop_pages(path: Path) -> None:
    """Out of the page cache; says so where the system keeps more than a hundredth."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            start = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
            resident = np.empty(-(-len(mapped) // mmap.PAGESIZE), dtype=np.uint8)
            ctypes.CDLL(None).mincore(
                ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(resident.ctypes.data)
            )
    if resident.mean() > 0.01:
        print(f"not cold: the system keeps {resident.mean():.0%} of the pages of {path.name}")


def timed(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def report(what: str, size: int, seconds: dict[str, list[float]]) -> None:
    raw = next(iter(seconds.values()))
    for name, taken in seconds.items():
        ratio = statistics.median(one / other for one, other in zip(raw, taken, strict=True))
        print(f"| {what} | {name} | {size / 1e6 / statistics.median(taken):.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()

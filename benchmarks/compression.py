"""What compression saves on real caches, and what it costs: for a few levels with and without shuffle, and as it is written.

    layerwise run --recipe demo --keep all --max-epochs 3 --out runs/measured
    python benchmarks/compression.py cache/measured/stage-1.h5 cache/measured/stage-3.h5 cache/measured/stage-6.h5

Codec: one thread, on the first 32 MB. As written: a whole cache, by CacheWriter with and without compression; sealed on all
cores; windows as the demo trains on them, or
whole pictures, all over the file, from memory, one thread, checksums compared before; medians of turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard

from layerwise.cache import ActivationCache, CacheWriter
from layerwise.cache.dtypes import as_array
from layerwise.cache.packing import packed

SAMPLE_BYTES = 32 * 10**6
WINDOW, TURN, TURNS = 10_240, 200, 9
"""Samples of sound in a window; windows of a turn; turns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", type=Path, nargs="+", help="of a run without compression")
    options = parser.parse_args()
    print("| cache | zeros | shuffle | level | ratio | compress MB/s | decompress MB/s |\n" + "| --- " * 7 + "|")
    for path in options.caches:
        measure_codec(path)
    print(
        f"\n{os.cpu_count()} cores\n\n| cache | MB | packed MB | ratio | packing MB/s | windows MB/s | packed | ratio |\n"
        + "| --- " * 8
        + "|"
    )
    for path in options.caches:
        measure_files(path)


def measure_codec(path: Path) -> None:
    with ActivationCache(path) as cache:
        layout, size = packed(cache.layout), packed(cache.layout).block_bytes
        rows = cache._blocks.read(0, min(SAMPLE_BYTES, layout.activation_bytes) // size * size // layout.row_bytes)
    itemsize, zeros = rows.itemsize, (rows == 0).mean()
    chunks = rows.reshape(-1).view(np.uint8).reshape(-1, size)
    for shuffle in (False, True)[:itemsize]:
        prepared = chunks.reshape(len(chunks), -1, itemsize).swapaxes(1, 2) if shuffle else chunks
        prepared = np.ascontiguousarray(prepared).reshape(len(chunks), size)
        for level in (1, 3, 9):
            compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
            frames: list[bytes] = []
            compress = timed(lambda: frames.extend(compressor.compress(chunk) for chunk in prepared))  # noqa: B023
            decompress = timed(lambda: [decompressor.decompress(frame) for frame in frames])  # noqa: B023
            print(
                f"| {path.parent.name} {path.stem} | {zeros:.2f} | {'yes' if shuffle else 'no'} | {level} "
                f"| {rows.nbytes / sum(map(len, frames)):.2f} | {rows.nbytes / 1e6 / compress:.0f} "
                f"| {rows.nbytes / 1e6 / decompress:.0f} |",
                flush=True,
            )


def measure_files(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ActivationCache(path) as source:
        sizes, caches = [], []
        for compression in ("none", "zstd"):
            copy = Path(folder) / f"{compression}.h5"
            with CacheWriter(copy, source.layout, compression=compression) as writer:
                for sample, length in enumerate(source.lengths.tolist()):
                    for view in range(source.views):
                        writer.write(as_array(source.read(sample, 0, length, view)))
                for name in source.layout.frame_labels_classes:
                    for sample in range(len(source.ids)):
                        writer.put_frame_labels(name, sample, source.frame_labels(name, sample).astype(str))
                writer._wait(0)
                packing = source.layout.activation_bytes / 1e6 / timed(writer.seal)  # of the last one
            sizes.append(copy.stat().st_size / 1e6)
            caches.append(ActivationCache(copy))
            caches[-1].verify()
        rng = np.random.default_rng(0)
        taken: list[list[float]] = [[], []]
        for _ in range(TURNS):
            windows = [window(rng, source) for _ in range(TURN)]
            for cache, seconds in zip(caches, taken, strict=True):
                seconds.append(timed(lambda: [cache.read(*ends) for ends in windows]))  # noqa: B023
        rows = sum(stop - start for _, start, stop in windows)
        speeds = [rows * source.layout.row_bytes / 1e6 / statistics.median(seconds) for seconds in taken]
        for cache in caches:
            cache.close()
    print(
        f"| {path.parent.name} {path.stem} | {sizes[0]:.1f} | {sizes[1]:.1f} | {sizes[0] / sizes[1]:.2f} | {packing:.0f} "
        f"| {speeds[0]:.0f} | {speeds[1]:.0f} | {speeds[1] / speeds[0]:.2f} |",
        flush=True,
    )


def window(rng: np.random.Generator, source: ActivationCache) -> tuple[int, int, int]:
    sample = int(rng.integers(len(source.lengths)))
    length = int(source.lengths[sample])
    rows = min(WINDOW // source.layout.hop, length)
    start = int(rng.integers(length - rows + 1))
    return sample, start, start + rows


def timed(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

"""A compressed cache holds what an uncompressed one does; whatever stops the packing, a later writer makes the same bytes."""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cache import layout, memory_below, read_all, rows_of, seal, write

from layerwise.cache import ActivationCache, CacheWriter, Layout
from layerwise.cache.dtypes import STORED, as_array
from layerwise.errors import CacheError, DamagedCache

RAGGED = [500, 0, 3, 700, 1]


def pictures(a_layout: Layout) -> Layout:
    """Grids of 5 patches a row, with frames of 4 channels of 3 x 3."""
    return replace(
        a_layout, lengths=np.array([25, 25, 25, 25, 25]), columns=5, frame_shape=(4, 3, 3), frame_labels_classes={}
    )


def noise(a_layout: Layout) -> torch.Tensor:
    """Rows of which half are zeros, as behind a ReLU."""
    rows = torch.randn(a_layout.rows, *a_layout.frame_shape, generator=torch.Generator().manual_seed(0)).relu()
    return rows.to(STORED[a_layout.dtype].tensor)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["sequences", "pictures"])
def test_a_compressed_cache_holds_the_same_bits(tmp_path: Path, dtype: str, views: int, kind: str) -> None:
    a_layout = layout(RAGGED, dtype, views, scale_rows=64)
    if kind == "pictures":
        a_layout = pictures(a_layout)
    rows = noise(a_layout)
    write(tmp_path / "raw.h5", a_layout, rows)
    write(tmp_path / "packed.h5", a_layout, rows, compression="zstd")
    assert torch.equal(read_all(tmp_path / "packed.h5"), read_all(tmp_path / "raw.h5"))
    with ActivationCache(tmp_path / "packed.h5") as cache:
        cache.verify()
        assert cache.layout.compression == "zstd"
        assert cache.layout.blocks > 2
        as_raw = {name: getattr(a_layout, name) for name in ("compression", "block_bytes", "chain_blocks")}
        assert replace(cache.layout, **as_raw) == a_layout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed.h5", "raw.h5"]


@pytest.fixture(scope="module")
def three_thousand_rows(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    path = tmp_path_factory.mktemp("packed") / "c.h5"
    write(path, layout([3000]), noise(layout([3000])), compression="zstd")
    with ActivationCache(path) as cache:
        yield cache


@settings(max_examples=200, deadline=None)
@given(ends=st.tuples(st.integers(0, 3000), st.integers(0, 3000)))
def test_any_window_is_a_slice_of_the_whole(three_thousand_rows: ActivationCache, ends: tuple[int, int]) -> None:
    start, stop = sorted(ends)
    assert torch.equal(three_thousand_rows.read(0, start, stop), noise(layout([3000]))[start:stop])


def test_threads_read_a_compressed_cache_at_once(three_thousand_rows: ActivationCache) -> None:
    rows = noise(layout([3000]))
    windows = [(start, start + 700) for start in range(0, 2000, 7)]
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda ends: three_thousand_rows.read(0, *ends), windows)
        for (start, stop), window in zip(windows, read, strict=True):
            assert torch.equal(window, rows[start:stop])


@pytest.mark.parametrize("dtype", STORED)
def test_h5py_with_hdf5plugin_reads_the_same_rows(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("hdf5plugin")
    a_layout = layout(RAGGED, dtype)
    for compression in ("none", "zstd"):
        write(tmp_path / f"{compression}.h5", a_layout, noise(a_layout), compression=compression)
    script = """
import h5py, hdf5plugin, numpy as np
with h5py.File("none.h5") as raw, h5py.File("zstd.h5") as packed:
    assert packed["activations"].chunks is not None
    assert np.array_equal(raw["activations"][:], packed["activations"][:])
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)  # elsewhere: the filter stays registered


def test_the_example_of_the_readme_for_compressed_caches_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache" / "packed").mkdir(parents=True)
    write(tmp_path / "cache" / "packed" / "stage-6.h5", layout([500]), noise(layout([500])), compression="zstd")
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[2] / "cache" / "README.md"
    scope: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)[1], scope)
    assert capsys.readouterr().out == "(166, 3)\n"


def test_zeros_take_less_room(tmp_path: Path) -> None:
    a_layout = replace(layout([10_000]), frame_shape=(64,), frame_labels_classes={})
    for compression in ("none", "zstd"):
        with CacheWriter(tmp_path / f"{compression}.h5", a_layout, compression=compression) as writer:
            writer.write(as_array(noise(a_layout)))
            seal(writer)
    assert (tmp_path / "zstd.h5").stat().st_size < 0.75 * (tmp_path / "none.h5").stat().st_size


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_cache_without_rows_needs_no_compression(tmp_path: Path, lengths: list[int]) -> None:
    write(tmp_path / "c.h5", layout(lengths), rows_of(layout(lengths)), compression="zstd")
    with ActivationCache(tmp_path / "c.h5") as cache:
        assert cache.layout == layout(lengths)


def test_packing_and_reading_take_little_memory(tmp_path: Path) -> None:
    a_layout = replace(layout([2**20] * 4), frame_labels_classes={}, block_bytes=2**14)  # 25 MB
    piece = np.random.default_rng(0).random((2**16, 3)).astype(np.float16)
    with CacheWriter(tmp_path / "c.h5", a_layout, 4 * 2**20, "zstd") as writer:
        for _ in range(64):
            writer.write(piece)
        with memory_below(12 * 2**20):
            seal(writer)
    with memory_below(3 * 2**20), ActivationCache(tmp_path / "c.h5") as cache:
        cache.verify()
        for start in range(0, 2**20, 2**10):
            cache.read(start % 4, start, start + 2**10)


STEPS = ["posix_fallocate", "pwrite", "fsync", "replace", "unlink"]


@pytest.mark.parametrize("step", STEPS)
def test_a_stop_between_two_steps_of_packing_ends_with_the_same_bytes(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_layout = layout(RAGGED, "int8", scale_rows=64)
    rows = noise(a_layout)
    write(tmp_path / "whole" / "c.h5", a_layout, rows, compression="zstd")
    call, calls = getattr(os, step), 0

    def stop_at(number: int) -> None:
        def counted(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.EIO, "stopped here")
            return call(*arguments, **named)

        with monkeypatch.context() as patched, CacheWriter(path, a_layout, 10**6, "zstd") as writer:
            writer.write(as_array(rows[writer.rows_done :]))
            patched.setattr(os, step, counted)
            patched.setattr("layerwise.cache.packing.BLOCK_BYTES", 1000)
            seal(writer)

    for number in range(1, 50):
        path, calls = tmp_path / str(number) / "c.h5", 0
        try:
            stop_at(number)
        except CacheError as error:
            assert "stopped here" in str(error)
        else:
            break
        if not path.exists():
            write(path, a_layout, rows, compression="zstd")
            assert [file.name for file in path.parent.iterdir()] == ["c.h5"]
        assert path.read_bytes() == (tmp_path / "whole" / "c.h5").read_bytes()
    assert 1 < number < 49


def test_killed_again_and_again_while_it_packs_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    a_layout = layout([300_000], block_bytes=4096)
    write(tmp_path / "whole.h5", a_layout, noise(a_layout), append_bytes=10**6, compression="zstd")
    rows, options = noise(a_layout), {"append_bytes": 10**6, "compression": "zstd"}
    path, packing = tmp_path / "c.h5", tmp_path / "c.h5.packing"
    context = multiprocessing.get_context("fork")
    kills = 0
    for pause in (0, 0.02, 0.05, 0.1):
        process = context.Process(target=write, args=(path, a_layout, rows), kwargs=options)
        process.start()
        while process.is_alive() and not (packing.exists() and packing.stat().st_size > 10**6):
            time.sleep(0.0005)
        time.sleep(pause)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if path.exists():
            break
        assert (tmp_path / "c.h5.part").exists()
    assert kills > 0
    if not path.exists():
        write(path, a_layout, noise(a_layout), append_bytes=10**6, compression="zstd")
        assert not packing.exists()
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_disk_that_is_too_small_for_packing_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    a_layout = layout([80_000], block_bytes=4096)  # half the disk
    rows = noise(a_layout)
    with pytest.raises(CacheError, match=r"No room is left on the disk for .*c\.h5\.packing; free some"):
        write(small_disk / "c.h5", a_layout, rows, append_bytes=10**6, compression="zstd")
    assert not (small_disk / "c.h5.packing").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    with CacheWriter(small_disk / "c.h5", a_layout, compression="zstd") as writer:
        assert writer.rows_done == 80_000
    write(small_disk / "c.h5", a_layout, rows, compression="zstd")
    write(tmp_path / "c.h5", a_layout, rows, append_bytes=10**6, compression="zstd")
    assert (small_disk / "c.h5").read_bytes() == (tmp_path / "c.h5").read_bytes()


def test_a_wish_to_stop_ends_the_packing_and_keeps_the_rows(tmp_path: Path) -> None:
    a_layout = layout([100])

    def stop() -> None:
        raise InterruptedError

    with CacheWriter(tmp_path / "c.h5", a_layout, compression="zstd") as writer:
        writer.write(rows_of(a_layout).numpy())
        with pytest.raises(CacheError):
            seal(writer, stop)
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:  # uncompressed now: that may change between two starts
        assert writer.rows_done == 100
        seal(writer)
    assert torch.equal(read_all(tmp_path / "c.h5"), rows_of(a_layout))


def test_rows_that_changed_on_the_disk_before_they_were_packed_are_found(tmp_path: Path) -> None:
    a_layout = layout([1000])
    part = tmp_path / "c.h5.part"
    with CacheWriter(tmp_path / "c.h5", a_layout, compression="zstd") as writer:
        writer.write(rows_of(a_layout).numpy())
    with h5py.File(part) as file:
        place = file["activations"].id.get_offset()
    content = bytearray(part.read_bytes())
    content[place + 2345] ^= 1
    part.write_bytes(content)
    with CacheWriter(tmp_path / "c.h5", a_layout, compression="zstd") as writer:  # noqa: SIM117
        with pytest.raises(DamagedCache, match=r"c\.h5\.part is damaged: block 23 "):
            seal(writer)
    assert not (tmp_path / "c.h5").exists()


def test_without_zstandard_the_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_layout = layout([100])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout), compression="zstd")
    monkeypatch.setattr("layerwise.cache.zstd.zstandard", None)
    for attempt in (
        lambda: ActivationCache(tmp_path / "c.h5"),
        lambda: CacheWriter(tmp_path / "new.h5", a_layout, compression="zstd"),
    ):
        with pytest.raises(CacheError, match=re.escape("pip install 'layerwise[compression]'")) as error:
            attempt()
        assert not isinstance(error.value, DamagedCache)

"""Windows that are read together, by the compiled reader or by Python alone, are those that are read one by one."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_cache import layout, rows_of, write

from layerwise.cache import ActivationCache, Layout, blocks
from layerwise.cache.layout import BLOCK_BYTES
from layerwise.cache.reader import BatchMemory
from layerwise.errors import DamagedCache

Place = tuple[int, int, int, int]

ONE_READER = [HealthCheck.function_scoped_fixture]  # is the same one for all inputs of a test

BUILT = blocks.read_windows is not None and blocks.CRC32_ADDRESS != 0
READERS = [
    pytest.param("compiled", marks=pytest.mark.skipif(not BUILT, reason="layerwise was installed without a compiler")),
    "Python",
]


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "Python":
            patched.setattr(blocks, "read_windows", None)
        yield request.param


def padded(windows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)


def test_it_is_compiled_wherever_a_compiler_is() -> None:
    if not shutil.which("cc") or not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("there is no compiler, or no header of Python")
    assert BUILT, "pip install this checkout again"


@st.composite
def caches_and_batches(draw: st.DrawFn) -> tuple[Layout, list[list[Place]]]:
    lengths = draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))
    a_layout = layout(
        lengths,
        draw(st.sampled_from(["float16", "bfloat16", "float32", "int8"])),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 300)),
        draw(st.integers(1, 9)),
        scale_rows=16,
    )

    @st.composite
    def window(draw: st.DrawFn) -> Place:
        sample = draw(st.integers(0, len(lengths) - 1))
        start = draw(st.integers(0, lengths[sample]))
        return sample, start, draw(st.integers(start, lengths[sample])), draw(st.integers(0, a_layout.views - 1))

    return a_layout, draw(st.lists(st.lists(window(), min_size=1, max_size=6), min_size=1, max_size=5))


@pytest.mark.parametrize("compression", ["none", "zstd"])
@settings(max_examples=60, deadline=None, suppress_health_check=ONE_READER)
@given(drawn=caches_and_batches())
def test_a_batch_holds_its_windows_and_zeros(
    tmp_path_factory: pytest.TempPathFactory, reader: str, compression: str, drawn: tuple[Layout, list[list[Place]]]
) -> None:
    a_layout, batches = drawn
    path = tmp_path_factory.mktemp("batches") / "c.h5"
    write(path, a_layout, rows_of(a_layout), append_bytes=500, compression=compression)
    with ActivationCache(path) as one_by_one, ActivationCache(path) as together:
        for batch in batches:
            read = together.read_batch(batch)
            assert read.is_contiguous()
            assert read.dtype == one_by_one.read(*batch[0]).dtype
            assert torch.equal(read, padded([one_by_one.read(*window) for window in batch]))


@settings(max_examples=75, deadline=None, suppress_health_check=ONE_READER)
@given(
    block_bytes=st.integers(1, 200),
    chain_blocks=st.integers(1, 9),
    bit=st.integers(0, 200 * 6 * 8 - 1),
    batches=st.lists(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), min_size=1, max_size=5), max_size=5),
)
def test_whatever_was_read_before_a_batch_is_right_or_its_damage_is_named(
    tmp_path_factory: pytest.TempPathFactory,
    reader: str,
    block_bytes: int,
    chain_blocks: int,
    bit: int,
    batches: list[list[tuple[int, int]]],
) -> None:
    path = tmp_path_factory.mktemp("damage") / "c.h5"
    a_layout = layout([200], block_bytes=block_bytes, chain_blocks=chain_blocks)
    rows = rows_of(a_layout)
    write(path, a_layout, rows, append_bytes=1000)
    flip(path, bit)
    damaged = bit // 8 // block_bytes
    with ActivationCache(path) as cache:
        for batch in batches:
            ends = [(start, min(start + length, 200)) for start, length in batch]
            windows = [(0, start, stop, 0) for start, stop in ends]
            if any(a < b and a * 6 // block_bytes <= damaged <= (b * 6 - 1) // block_bytes for a, b in ends):
                with pytest.raises(DamagedCache, match=f"block {damaged} "):
                    cache.read_batch(windows)
            else:
                assert torch.equal(cache.read_batch(windows), padded([rows[start:stop] for start, stop in ends]))


@pytest.mark.parametrize("block_bytes", [BLOCK_BYTES, BLOCK_BYTES + 1])
def test_blocks_of_the_usual_size_are_read_together_and_longer_ones_one_by_one(
    tmp_path: Path, reader: str, block_bytes: int
) -> None:
    a_layout = layout([9000], block_bytes=block_bytes, chain_blocks=4)
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows, append_bytes=10_000)
    windows = [(0, 1, 800, 0), (0, 2000, 5000, 0), (0, 7000, 9000, 0)]
    with ActivationCache(tmp_path / "c.h5") as cache:
        assert torch.equal(cache.read_batch(windows), padded([rows[start:stop] for _, start, stop, _ in windows]))
    with ActivationCache(tmp_path / "c.h5") as cache:
        together = cache._blocks.read_together([(1, 800), (2000, 5000)], np.zeros((2, 3000, 3), dtype="<f2"))
        assert together == (2 if reader == "compiled" and block_bytes == BLOCK_BYTES else 0)
    for block in (0, a_layout.blocks - 1):
        flip(tmp_path / "c.h5", 8 * block_bytes * block + 8)
        with ActivationCache(tmp_path / "c.h5") as cache, pytest.raises(DamagedCache, match=f"block {block} "):
            cache.read_batch(windows)
        flip(tmp_path / "c.h5", 8 * block_bytes * block + 8)


@pytest.mark.parametrize("chain_blocks", [1, 3, 20])
def test_blocks_that_were_compared_vouch_for_no_others(tmp_path: Path, reader: str, chain_blocks: int) -> None:
    a_layout = layout([200], block_bytes=60, chain_blocks=chain_blocks)
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows)
    for block in range(20):
        flip(tmp_path / "c.h5", 8 * 60 * block + 99)
        with ActivationCache(tmp_path / "c.h5") as cache:
            others = [(0, 10 * other, 10 * other + 10, 0) for other in range(20) if other != block]
            assert torch.equal(
                cache.read_batch(others), torch.stack([rows[start:stop] for _, start, stop, _ in others])
            )
            for window in ((10 * block, 10 * block + 1), (max(10 * block - 15, 0), min(10 * block + 25, 200))):
                with pytest.raises(DamagedCache, match=f"block {block} "):
                    cache.read_batch([(0, *window, 0)])
        flip(tmp_path / "c.h5", 8 * 60 * block + 99)


def test_a_block_is_compared_once(tmp_path: Path, reader: str) -> None:
    a_layout = layout([200], block_bytes=60)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with ActivationCache(tmp_path / "c.h5") as cache:
        cache.read_batch([(0, 30, 60, 0)])  # blocks 3 to 5
        flip(tmp_path / "c.h5", 8 * 60 * 3)
        flip(tmp_path / "c.h5", 8 * 60 * 5)
        cache.read_batch([(0, 30, 60, 0), (0, 25, 60, 0), (0, 30, 65, 0), (0, 25, 65, 0)])
        with pytest.raises(DamagedCache, match="block 3 "):
            cache.verify()


def test_a_window_of_more_blocks_than_are_looked_up_at_once(tmp_path: Path, reader: str) -> None:
    a_layout = layout([5000], block_bytes=7, chain_blocks=600)
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows, append_bytes=10_000)
    with ActivationCache(tmp_path / "c.h5") as cache:
        batch = cache.read_batch([(0, 1, 4999, 0), (0, 4000, 5000, 0)])
        assert torch.equal(batch, padded([rows[1:4999], rows[4000:]]))
    flip(tmp_path / "c.h5", 8 * 7 * 4000)
    with ActivationCache(tmp_path / "c.h5") as cache, pytest.raises(DamagedCache, match="block 4000 "):
        cache.read_batch([(0, 1, 4999, 0)])


def test_a_file_that_is_cut_off_while_it_is_open_is_found(tmp_path: Path, reader: str) -> None:
    a_layout = layout([100, 100])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with ActivationCache(tmp_path / "c.h5") as cache:
        cache.verify()
        with h5py.File(tmp_path / "c.h5") as file:
            end = file["activations"].id.get_offset() + 150 * 6
        with open(tmp_path / "c.h5", "r+b") as file:
            file.truncate(end)
        assert torch.equal(cache.read_batch([(0, 0, 50, 0)])[0], rows_of(a_layout)[:50])
        with pytest.raises(DamagedCache, match="it ends early"):
            cache.read_batch([(0, 0, 50, 0), (1, 40, 60, 0)])


def test_windows_that_are_not_there_are_refused(tmp_path: Path, reader: str) -> None:
    write(tmp_path / "c.h5", layout([10]), rows_of(layout([10])))
    with ActivationCache(tmp_path / "c.h5") as cache:
        for window in ((0, 0, 11, 0), (0, -1, 5, 0), (0, 5, 4, 0), (1, 0, 1, 0), (0, 0, 1, 1)):
            with pytest.raises(IndexError, match="are not in"):
                cache.read_batch([(0, 0, 5, 0), window])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_windows_may_be_counted_with_numpy_or_torch(tmp_path: Path, reader: str, dtype: str) -> None:
    write(tmp_path / "c.h5", layout([100, 80], dtype), rows_of(layout([100, 80], dtype)))
    with ActivationCache(tmp_path / "c.h5") as cache:
        expected = cache.read_batch([(0, 10, 80, 0), (1, 5, 80, 0)])
    with ActivationCache(tmp_path / "c.h5") as cache:
        assert torch.equal(cache.read(torch.tensor(1), np.int64(5), cache.lengths[1]), expected[1])
    with ActivationCache(tmp_path / "c.h5") as cache:
        assert torch.equal(cache.read_batch(np.array([[0, 10, 80, 0], [1, 5, 80, 0]])), expected)


def test_a_closed_cache_is_not_read_though_another_file_has_its_descriptor(tmp_path: Path, reader: str) -> None:
    write(tmp_path / "c.h5", layout([100]), rows_of(layout([100])))
    with ActivationCache(tmp_path / "c.h5") as cache:
        cache.read_batch([(0, 0, 100, 0)])
    with open(tmp_path / "c.h5", "rb"):
        for read in (
            partial(cache.read, 0, 0, 10),
            partial(cache.read_batch, [(0, 0, 10, 0)]),
            partial(cache.frame_labels, "phone", 0),
            cache.verify,
        ):
            with pytest.raises(ValueError, match=r"c\.h5 is closed"):
                read()


def test_threads_read_batches_at_once(tmp_path: Path, reader: str) -> None:
    a_layout = layout([400], block_bytes=64)
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows, append_bytes=10_000)
    starts = np.random.default_rng(0).integers(0, 300, (300, 8)).tolist()
    with ActivationCache(tmp_path / "c.h5") as cache, ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda batch: cache.read_batch([(0, start, start + 100, 0) for start in batch]), starts)
        for batch, frames in zip(starts, read, strict=True):
            assert torch.equal(frames, torch.stack([rows[start : start + 100] for start in batch]))


def test_a_forked_child_reads_on(tmp_path: Path, reader: str) -> None:
    a_layout = layout([200], block_bytes=64)
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows)
    with ActivationCache(tmp_path / "c.h5") as cache:
        held = cache.read_batch([(0, 0, 50, 0)])
        child = os.fork()
        if child == 0:
            read = [cache.read_batch([(0, start, start + 50, 0)]) for start in range(100)]
            os._exit(0 if all(torch.equal(batch[0], rows[n : n + 50]) for n, batch in enumerate(read)) else 1)
        for start in range(100):
            cache.read_batch([(0, start + 50, start + 100, 0)])
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(held[0], rows[:50])


def test_without_isa_l_python_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CRC32_ADDRESS", 0)
    write(tmp_path / "c.h5", layout([20]), rows_of(layout([20])))
    with ActivationCache(tmp_path / "c.h5") as cache:
        assert cache.reading_threads == 1
        assert torch.equal(cache.read_batch([(0, 3, 9, 0)])[0], rows_of(cache.layout)[3:9])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_several_threads_read_only_where_they_do_not_wait_for_each_other(
    tmp_path: Path, reader: str, dtype: str
) -> None:
    write(tmp_path / "c.h5", layout([20], dtype), rows_of(layout([20], dtype)))
    with ActivationCache(tmp_path / "c.h5") as cache:
        assert (cache.reading_threads > 1) == (reader == "compiled" and dtype != "int8")


@pytest.mark.skipif(not BUILT, reason="layerwise was installed without a compiler")
def test_the_compiled_reader_stops_at_what_it_cannot_vouch_for(tmp_path: Path) -> None:
    a_layout = layout([200], block_bytes=60)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    flip(tmp_path / "c.h5", 8 * 60 * 5)
    with ActivationCache(tmp_path / "c.h5") as cache:
        into = np.zeros((4, 10, 3), dtype="<f2")
        assert cache._blocks.read_together([(0, 10), (30, 40), (45, 55), (100, 110)], into) == 2
        assert cache._blocks.read_together([(0, 11)], into[:1]) == 0  # more than there is room for
        assert cache._blocks.read_together([(-1, 1)], into[:1]) == 0
        assert cache._blocks.read_together([(195, 201)], into[:1]) == 0
        assert cache._blocks.read_together([(0, 10), (30, 40)], into[:1]) == 1
        flip(tmp_path / "c.h5", 8 * 60 * 3)  # it was compared, and is not again
        assert cache._blocks.read_together([(30, 40), (25, 40), (28, 33), (30, 37)], np.zeros((4, 15, 3), "<f2")) == 4
        assert cache._blocks.read_together([(30, 51)], np.zeros((1, 21, 3), "<f2")) == 0


def test_a_batch_that_is_held_stays_as_it_is_and_the_memory_of_others_is_used_again(
    tmp_path: Path, reader: str
) -> None:
    a_layout = layout([200])
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows)
    with ActivationCache(tmp_path / "c.h5") as cache:
        view = cache.read_batch([(0, 5, 25, 0)])[0, 3:].unsqueeze(0)  # the tensor itself is gone
        for start in range(50):
            cache.read_batch([(0, start, start + 20, 0)])
        assert torch.equal(view[0], rows[8:25])
        assert len(cache._memory._free) == 1


def test_memory_is_lent_to_one_at_a_time_and_only_as_much_as_was_held_at_once_is_kept() -> None:
    memory = BatchMemory()
    held = [memory.array((100, 3), "<f4") for _ in range(10)]
    for number, array in enumerate(held):
        array[:] = number
    assert [set(array.flatten().tolist()) for array in held] == [{number} for number in range(10)]
    del held, array
    assert len(memory._free) == 4
    rooms = {room.ctypes.data for room in memory._free}
    assert memory.array((50, 3), "<f4").ctypes.data in rooms
    assert memory.array((1000, 3), "<f4").shape == (1000, 3)
    assert [len(room) for room in memory._free] == [12_000]  # those that were too small are let go of
    assert memory.array((0, 3), "<f4").nbytes == 0


def flip(path: Path, bit: int) -> None:
    """Of the activations."""
    with h5py.File(path) as file:
        place = file["activations"].id.get_offset() + bit // 8
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit % 8]))

"""The activation cache: what is written comes back, and anyone's h5py reads it."""

import errno
import os
import re
import zlib
from dataclasses import replace
from itertools import pairwise
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
from layerwise.cache.format import file_bytes
from layerwise.cache.layout import BLOCK_BYTES
from layerwise.cache.packing import packed, packed_bytes
from layerwise.errors import CacheError

EXACT = ["float16", "bfloat16", "float32"]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("views", [1, 2])
def test_every_window_comes_back_as_written(tmp_path: Path, dtype: str, views: int) -> None:
    a_layout = layout([5, 1, 40, 7], dtype, views)
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows)
    with ActivationCache(tmp_path / "c.h5") as cache:
        for sample, length in enumerate(a_layout.lengths.tolist()):
            for view in range(views):
                first = int(a_layout.offsets[sample * views + view])
                for start in range(length):
                    window = cache.read(sample, start, length, view)
                    assert window.dtype == getattr(torch, dtype)
                    assert torch.equal(window, rows[first + start : first + length])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=6),
    dtype=st.sampled_from(EXACT),
    views=st.integers(1, 3),
    block_bytes=st.integers(1, 300),
    chain_blocks=st.integers(1, 9),
    append_bytes=st.integers(1, 1000),
    pieces=st.integers(1, 9),
)
def test_samples_of_any_length_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    dtype: str,
    views: int,
    block_bytes: int,
    chain_blocks: int,
    append_bytes: int,
    pieces: int,
) -> None:
    path = tmp_path_factory.mktemp("any") / "c.h5"
    a_layout = layout(lengths, dtype, views, block_bytes, chain_blocks)
    rows = rows_of(a_layout)
    write(path, a_layout, rows, pieces, append_bytes)
    with ActivationCache(path) as cache:
        assert cache.layout == a_layout
        cache.verify()
    if lengths:
        assert torch.equal(read_all(path), rows)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_frames_that_are_expected_are_fetched_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    a_layout = layout([40, 300], views=2)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout), compression=compression)
    fetched = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *place: fetched.append(place))
    with ActivationCache(tmp_path / "c.h5") as cache:
        cache.expect([(1, 10, 10, 0), (1, 10, 200, 1)])
    with h5py.File(tmp_path / "c.h5") as file:
        first = None if compression != "none" else file["activations"].id.get_offset() + (2 * 40 + 300 + 10) * 6
    assert fetched == ([] if first is None else [(first, 190 * 6, os.POSIX_FADV_WILLNEED)])


@pytest.mark.parametrize(("in_memory", "windows"), [("nothing", 300), ("what was fetched", 300), ("all", 80)])
def test_batches_are_fetched_ahead_for_as_long_as_they_are_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: str, windows: int
) -> None:
    a_layout = layout([300])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    fetched: list[int] = []
    preadv = os.preadv

    def preadv_of_this_memory(descriptor: int, buffers: list[object], position: int, flags: int = 0) -> int:
        known = {"nothing": False, "what was fetched": position in fetched, "all": True}[in_memory]
        if flags == os.RWF_NOWAIT and not known:
            raise BlockingIOError
        return preadv(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", preadv_of_this_memory)
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, position, *_: fetched.append(position))
    with ActivationCache(tmp_path / "c.h5") as cache:
        for first in range(0, 300, 10):
            cache.expect((0, start, start + 1, 0) for start in range(first, first + 10))
            for start in range(first, first + 10):
                cache.read(0, start, start + 1)
        assert len(fetched) == windows
        in_memory = "nothing"  # the system needed the room
        cache.expect([(0, 10, 20, 0)])
    assert len(fetched) == windows + 1


def test_a_long_window_is_fetched_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_layout = replace(layout([500_000], block_bytes=BLOCK_BYTES), frame_labels_classes={})
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    fetched = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, position, size, __: fetched.append((position, size)))
    with ActivationCache(tmp_path / "c.h5") as cache:
        cache.expect([(0, 0, 400_000, 0)])
    assert [size for _, size in fetched] == [2**20, 2**20, 400_000 * 6 - 2 * 2**20]
    assert all(first + size == second for (first, size), (second, _) in pairwise(fetched))


def test_a_system_that_cannot_fetch_ahead_or_tell_what_is_in_memory_reads_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    a_layout = layout([300])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    monkeypatch.setattr(os, "posix_fadvise", refused)
    with ActivationCache(tmp_path / "c.h5") as cache:
        cache.expect([(0, 10, 200, 0)])
        assert torch.equal(cache.read(0, 10, 200), rows_of(a_layout)[10:200])


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_file_system_that_gives_a_few_bytes_at_a_time_is_asked_until_all_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    a_layout = layout([40, 3], chain_blocks=2)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout), compression=compression)
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda descriptor, size, position: pread(descriptor, min(size, 7), position))
    monkeypatch.setattr(
        os,
        "preadv",
        lambda descriptor, buffers, position, *flags: preadv(
            descriptor, [memoryview(buffers[0]).cast("B")[:7]], position, *flags
        ),
    )
    assert torch.equal(read_all(tmp_path / "c.h5"), rows_of(a_layout))
    with ActivationCache(tmp_path / "c.h5") as cache:
        cache.verify()


def test_everything_beside_the_activations_comes_back(tmp_path: Path) -> None:
    a_layout = layout([5, 2, 3])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with ActivationCache(tmp_path / "c.h5") as cache:
        for name in ("fingerprint", "stage", "dtype", "frame_shape", "columns", "views", "ids", "hop", "offset"):
            assert getattr(cache.layout, name) == getattr(a_layout, name), name
        assert cache.lengths.tolist() == [5, 2, 3]
        assert cache.layout.split.tolist() == [0, 1, 2]
        assert cache.labels["speaker"].tolist() == ["s0", "s1", "s0"]
        assert [cache.frame_labels("phone", sample).tolist() for sample in range(3)] == [
            list("ababa"),
            ["b", "a"],
            list("bab"),
        ]


def test_a_window_that_is_not_in_the_sample_is_an_index_error(tmp_path: Path) -> None:
    a_layout = layout([5, 2, 3])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with ActivationCache(tmp_path / "c.h5") as cache:
        for sample, start, stop, view in (
            (0, 0, 6, 0),
            (0, -1, 2, 0),
            (0, 3, 2, 0),
            (0, 0, 1, 1),
            (3, 0, 1, 0),
            (-1, 0, 1, 0),
        ):
            with pytest.raises(IndexError):
                cache.read(sample, start, stop, view)
        assert cache.read(1, 2, 2).shape == (0, 3)


def test_plain_h5py_reads_the_file(tmp_path: Path) -> None:
    a_layout = layout([5, 2, 3])
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows)
    with h5py.File(tmp_path / "c.h5") as file:
        assert np.array_equal(file["activations"][:], rows.numpy())
        assert file["offsets"][:].tolist() == [0, 5, 7, 10]
        assert file["ids"][2].decode() == "größe-2"
        assert file.attrs["complete"] == 1
        assert file.attrs["dtype"].decode() == "float16"


def test_the_checksums_are_those_of_the_readme(tmp_path: Path) -> None:
    a_layout = layout([500], block_bytes=1000, chain_blocks=2)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with h5py.File(tmp_path / "c.h5") as file:
        content, expected = file["activations"][:].tobytes(), file["checksums"][:]
    ends = [min((block + 1) * 1000, len(content)) for block in range(len(expected))]
    chains = [content[block // 2 * 2000 : end] for block, end in enumerate(ends)]
    assert [zlib.crc32(chain) for chain in chains] == expected.tolist()


@pytest.mark.parametrize("chain_blocks", [1, 2, 3, 256])
@pytest.mark.parametrize("length", [5, 80])
def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], length: int, chain_blocks: int
) -> None:
    (tmp_path / "cache" / "demo").mkdir(parents=True)
    a_layout = layout([length, 2, 3], chain_blocks=chain_blocks)
    write(tmp_path / "cache" / "demo" / "stage-6.h5", a_layout, rows_of(a_layout))
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[2] / "cache" / "README.md"
    exec(re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)[1], {})
    assert capsys.readouterr().out == f"2 größe-0 ({length}, 3)\n"


def test_large_activations_are_aligned_to_pages(tmp_path: Path) -> None:
    a_layout = layout([20000], block_bytes=BLOCK_BYTES)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["activations"].id.get_offset() % 4096 == 0


def test_the_size_of_an_append_does_not_show_in_the_file(tmp_path: Path) -> None:
    a_layout = layout([300, 200])
    for append_bytes in (1, 250, 10**6):
        write(tmp_path / f"{append_bytes}.h5", a_layout, rows_of(a_layout), append_bytes=append_bytes)
    assert len({path.read_bytes() for path in tmp_path.glob("*.h5")}) == 1


def test_rows_of_another_shape_or_dtype_or_number_are_a_defect_of_the_caller(tmp_path: Path) -> None:
    a_layout = layout([5])
    rows = as_array(rows_of(a_layout))
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        for wrong in (rows[:, :2], rows.astype(np.float32), np.concatenate([rows, rows])):
            with pytest.raises(ValueError, match="do not fit"):
                writer.write(wrong)


def test_writing_holds_two_appends_in_memory_and_reading_next_to_nothing(tmp_path: Path) -> None:
    a_layout = replace(layout([2**20] * 4, block_bytes=BLOCK_BYTES), frame_labels_classes={})  # 25 MB
    piece, append_bytes = np.ones((2**16, 3), dtype=np.float16), 4 * 2**20
    with (
        memory_below(2 * append_bytes + 2 * 2**20),
        CacheWriter(tmp_path / "c.h5", a_layout, append_bytes) as writer,
    ):
        for _ in range(64):
            writer.write(piece)
        seal(writer)
    with memory_below(2 * 2**20), ActivationCache(tmp_path / "c.h5") as cache:
        cache.verify()
        for start in range(0, 2**20, 2**10):
            cache.read(start % 4, start, start + 2**10)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"nothing\.h5 is missing"):
        ActivationCache(tmp_path / "nothing.h5")


def test_a_file_that_is_open_in_plain_h5py_can_be_read(tmp_path: Path) -> None:
    a_layout = layout([5])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with h5py.File(tmp_path / "c.h5", "r"):
        assert torch.equal(read_all(tmp_path / "c.h5"), rows_of(a_layout))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_samples_without_frames_are_read_as_such(tmp_path: Path, dtype: str) -> None:
    a_layout = layout([0, 0], dtype)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with ActivationCache(tmp_path / "c.h5") as cache:
        cache.verify()
        assert cache.read(1, 0, 0).shape == (0, 3)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_labels_of_frames_take_no_memory(tmp_path: Path, compression: str) -> None:
    a_layout = replace(layout([10_000] * 200, block_bytes=BLOCK_BYTES), frame_shape=(1,))  # 8 MB of labels
    with memory_below(4_000_000):
        with CacheWriter(tmp_path / "c.h5", a_layout, 2**16, compression) as writer:
            for _ in range(200):
                writer.write(np.zeros((10_000, 1), dtype=np.float16))
            seal(writer)
        with ActivationCache(tmp_path / "c.h5") as cache:
            assert cache.frame_labels("phone", 99)[:3].tolist() == ["a", "b", "a"]


def test_a_cache_is_not_sealed_without_the_labels_of_its_frames(tmp_path: Path) -> None:
    a_layout = layout([5, 2])
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        writer.write(as_array(rows_of(a_layout)))
        writer.put_frame_labels("phone", 0, np.array(["a"] * 5))
        with pytest.raises(ValueError, match="labels of frames are missing"):
            writer.seal()


@pytest.mark.parametrize("name", ["", ".", "a/b", "nul\0"])
def test_a_label_of_a_name_that_hdf5_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(CacheError, match="A label cannot be called"):
        replace(layout([3]), labels={name: np.zeros(1, np.int32)}, labels_classes={name: ("x",)})
    with pytest.raises(CacheError, match="A label cannot be called"):
        replace(layout([3]), frame_labels_classes={name: ("x",)})


ROOMY = {
    "few rows": layout([3, 4]),
    "scales": replace(layout([10_000] * 20, "int8", block_bytes=BLOCK_BYTES), frame_shape=(64,)),
    "labels of frames": replace(layout([100_000], block_bytes=BLOCK_BYTES), frame_shape=(1,)),
    "checksums": layout([50_000], block_bytes=64),
    "ids": replace(layout([1] * 20_000), ids=tuple(f"{number:0100}" for number in range(20_000))),
    "long labels": replace(layout([1] * 5), labels_classes={"speaker": ("s0", "x" * 10**6)}),
}


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("a_layout", ROOMY.values(), ids=ROOMY)
def test_the_room_of_a_file_is_known_before(tmp_path: Path, a_layout: Layout, compression: str) -> None:
    noise = np.random.default_rng(0).standard_normal((a_layout.rows, *a_layout.frame_shape)).astype(np.float16)
    with CacheWriter(tmp_path / "c.h5", a_layout, 2**20, compression) as writer:
        writer.write(noise.astype(STORED[a_layout.dtype].array))
        seal(writer)
    taken = (tmp_path / "c.h5").stat().st_size
    if compression == "none":
        assert taken <= file_bytes(a_layout) <= taken + 200_000
    else:
        assert taken <= packed_bytes(packed(a_layout)) <= 1.2 * file_bytes(a_layout) + 200_000

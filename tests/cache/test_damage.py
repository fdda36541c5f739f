"""Damage is found before any wrong value is used, and named."""

import errno
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cache import layout, read_all, read_batches, reseal, rows_of, write

from layerwise.cache import ActivationCache
from layerwise.cache.seal import USER_BLOCK
from layerwise.errors import CacheError, DamagedCache

FLIPS = 500


def sealed(path: Path, dtype: str = "float16", compression: str = "none") -> bytearray:
    a_layout = layout([50, 7, 50], dtype, block_bytes=100, scale_rows=16)
    if compression != "none":
        a_layout = replace(
            a_layout, lengths=np.array([500, 70, 5000]), frame_labels_classes={}
        )  # most of it activations
    write(path, a_layout, rows_of(a_layout), append_bytes=10_000, compression=compression)
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(("dtype", "read"), [("float16", read_all), ("float16", read_batches), ("int8", read_all)])
def test_every_flipped_bit_is_found(
    tmp_path: Path, dtype: str, read: Callable[[Path], object], compression: str
) -> None:
    path = tmp_path / "c.h5"
    content = sealed(path, dtype, compression)
    for bit in np.random.default_rng(0).choice(len(content) * 8, FLIPS, replace=False).tolist():
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(CacheError, match=r"c\.h5"):
            read(path)
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    read(path)


def test_every_flipped_bit_of_the_activations_is_found_by_reading_and_by_verify(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    content = sealed(path)
    first, stop = place(path)
    for position in range(first, stop, 7):
        content[position] ^= 16
        path.write_bytes(content)
        block = (position - first) // 100
        sentence = rf"c\.h5 is damaged: block {block} of its activations does not match"
        with pytest.raises(DamagedCache, match=sentence) as error:
            read_all(path)
        assert error.value.path == path
        with ActivationCache(path) as cache, pytest.raises(DamagedCache, match=sentence):
            cache.verify()
        content[position] ^= 16


def test_a_window_away_from_the_damage_can_be_read_and_one_upon_it_never(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    content = sealed(path)
    content[place(path)[0] + 250] ^= 8  # block 2: rows 33 to 50
    path.write_bytes(content)
    with ActivationCache(path) as cache:
        assert torch.equal(cache.read(0, 0, 33), rows_of(cache.layout)[:33])
        for _ in range(2):
            with pytest.raises(DamagedCache):
                cache.read(0, 34, 35)


@settings(max_examples=100, deadline=None)
@given(
    chain_blocks=st.integers(1, 9),
    bit=st.integers(0, 200 * 6 * 8 - 1),
    windows=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=12),
)
def test_whatever_was_read_before_a_window_is_right_or_its_damage_is_found(
    tmp_path_factory: pytest.TempPathFactory, chain_blocks: int, bit: int, windows: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("damage") / "c.h5"
    a_layout = layout([200], block_bytes=64, chain_blocks=chain_blocks)
    rows = rows_of(a_layout)
    write(path, a_layout, rows, append_bytes=1000)
    content = bytearray(path.read_bytes())
    content[place(path)[0] + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    damaged = bit // 8 // 64
    with ActivationCache(path) as cache:
        for start, length in windows:
            stop = min(start + length, 200)
            if start < stop and start * 6 // 64 <= damaged <= (stop * 6 - 1) // 64:
                with pytest.raises(DamagedCache, match=f"block {damaged} "):
                    cache.read(0, start, stop)
            else:
                assert torch.equal(cache.read(0, start, stop), rows[start:stop])


def test_a_block_is_compared_once(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    content = sealed(path)
    with ActivationCache(path) as cache:
        cache.read(0, 20, 21)  # block 1
        content[place(path)[0] + 150] ^= 8
        path.write_bytes(content)
        cache.read(0, 20, 30)
        with pytest.raises(DamagedCache, match="block 1 "):
            cache.verify()


def test_a_file_that_is_cut_off_is_refused_whatever_is_left(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    content = sealed(path)
    lengths = {0, 1, 8, 511, USER_BLOCK - 1, USER_BLOCK, USER_BLOCK + 8, len(content) - 1}
    lengths |= set(np.random.default_rng(0).integers(0, len(content), 50).tolist())
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(DamagedCache, match=r"c\.h5"):
            ActivationCache(path)


@pytest.mark.parametrize("where", ["everywhere", "checksums", "scales"])
def test_a_disk_that_does_not_give_back_what_it_holds_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "c.h5"
    sealed(path, "int8")
    cache = ActivationCache(path)
    places = cache._places
    bad = {"everywhere": 0, "checksums": places.checksums, "scales": places.scales}[where]

    def failing(read: Callable[..., object]) -> Callable[..., object]:
        def read_elsewhere(descriptor: int, into: object, position: int, *flags: int) -> object:
            if position == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(descriptor, into, position, *flags)

        return read_elsewhere

    monkeypatch.setattr(os, "preadv", failing(os.preadv))
    monkeypatch.setattr(os, "pread", failing(os.pread))
    with pytest.raises(DamagedCache, match="the disk does not give it back"):
        ActivationCache(path) if where == "everywhere" else cache.read(0, 0, 10)
    cache.close()


def test_scales_that_were_cut_off_are_not_made_up(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    sealed(path, "int8")
    with ActivationCache(path) as cache:
        cache.read(0, 0, 50)
        os.truncate(path, cache._places.scales)
        with pytest.raises(DamagedCache):
            cache.read(0, 0, 50)


def test_a_file_that_has_grown_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    size = len(sealed(path))
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(DamagedCache, match=f"it has {size + 4} bytes instead of {size}"):
        ActivationCache(path)


def test_a_file_that_is_cut_off_while_it_is_open_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    sealed(path)
    with ActivationCache(path) as cache:
        os.truncate(path, place(path)[0] + 100)
        with pytest.raises(DamagedCache, match="it ends early"):
            cache.read(0, 0, 50)


@pytest.mark.parametrize("content", [b"no HDF5 at all", bytes(10_000)])
def test_a_file_that_is_no_cache_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.h5").write_bytes(content)
    with pytest.raises(CacheError, match="nor any HDF5 file that can be read"):
        ActivationCache(tmp_path / "c.h5")


def test_a_file_of_version_1_is_refused_by_name(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.attrs.update({"format": "layerwise activation cache", "format_version": 1})
    with pytest.raises(
        CacheError, match=r"is a cache of format 1, and this layerwise reads format 4; a run .* makes it again"
    ):
        ActivationCache(tmp_path / "c.h5")


def test_a_file_of_a_later_version_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.h5"
    sealed(path)
    with monkeypatch.context() as patched:
        patched.setattr("layerwise.cache.seal.MAGIC", "layerwise activation cache 5")
        reseal(path)
    with pytest.raises(
        CacheError, match=r"is a cache of format 5, and this layerwise reads format 4; a run .* makes it again"
    ):
        ActivationCache(path)


def test_an_hdf5_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["x"] = [1, 2, 3]
    with pytest.raises(CacheError, match="holds no layerwise cache"):
        ActivationCache(tmp_path / "c.h5")


def test_the_error_travels_between_processes(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(DamagedCache(tmp_path, "it ends early")))
    assert (error.path, str(error)) == (tmp_path, str(DamagedCache(tmp_path, "it ends early")))


def place(path: Path) -> tuple[int, int]:
    """First and last byte of the activations."""
    with h5py.File(path) as file:
        data_set = file["activations"].id
        return data_set.get_offset(), data_set.get_offset() + data_set.get_storage_size()

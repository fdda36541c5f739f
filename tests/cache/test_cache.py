"""The activation cache: what is written comes back, a kill costs one block, and damage is found."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.cache import ActivationCache, CacheWriter, Layout
from layerwise.cache.format import as_stored
from layerwise.errors import CacheError


def layout(lengths: list[int], dtype: str = "float16", views: int = 1, block_bytes: int = 100) -> Layout:
    count = len(lengths)
    return Layout(
        fingerprint="f" * 64,
        stage=2,
        dtype=dtype,
        frame_shape=(3,),
        columns=1,
        views=views,
        lengths=np.array(lengths, dtype=np.int64),
        ids=tuple(f"größe-{number}" for number in range(count)),
        split=np.arange(count, dtype=np.uint8) % 3,
        labels={"speaker": np.array([f"s{number % 2}" for number in range(count)])},
        frame_labels={"phone": np.array(["a", "b"] * sum(lengths))[: sum(lengths)]},
        hop=160,
        offset=4.5,
        block_bytes=block_bytes,
    )


def rows_of(a_layout: Layout) -> torch.Tensor:
    rows = torch.arange(a_layout.rows * 3, dtype=torch.float32).reshape(-1, 3) / 16
    return rows.to(getattr(torch, a_layout.dtype))


def write(path: Path, a_layout: Layout, rows: torch.Tensor, pieces: int = 3) -> None:
    with CacheWriter(path, a_layout) as writer:
        for piece in torch.tensor_split(rows[writer.rows_done :], pieces):
            writer.write(as_stored(piece.contiguous(), a_layout.dtype))
        writer.seal()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("views", [1, 2])
def test_every_window_comes_back_as_written(tmp_path: Path, dtype: str, views: int) -> None:
    a_layout = layout([5, 1, 40, 7], dtype, views)
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows)
    with ActivationCache(tmp_path / "c.h5") as cache:
        cache.verify()
        for sample, length in enumerate(a_layout.lengths.tolist()):
            for view in range(views):
                first = int(a_layout.offsets[sample * views + view])
                for start in range(length):
                    window = cache.read(sample, start, length, view)
                    assert window.dtype == getattr(torch, dtype)
                    assert torch.equal(window, rows[first + start : first + length])


def test_everything_beside_the_activations_comes_back(tmp_path: Path) -> None:
    a_layout = layout([5, 2, 3])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with ActivationCache(tmp_path / "c.h5") as cache:
        for name in ("fingerprint", "stage", "dtype", "frame_shape", "columns", "views", "ids", "hop", "offset"):
            assert getattr(cache.layout, name) == getattr(a_layout, name), name
        assert cache.lengths.tolist() == [5, 2, 3]
        assert cache.layout.split.tolist() == [0, 1, 2]
        assert cache.labels["speaker"].tolist() == ["s0", "s1", "s0"]
        assert cache.layout.frame_labels["phone"].tolist() == list("ababababab")


def test_plain_h5py_reads_the_file(tmp_path: Path) -> None:
    a_layout = layout([5, 2, 3])
    rows = rows_of(a_layout)
    write(tmp_path / "c.h5", a_layout, rows)
    with h5py.File(tmp_path / "c.h5") as file:
        assert np.array_equal(file["activations"][:], rows.numpy())
        assert file["offsets"][:].tolist() == [0, 5, 7, 10]
        assert file["activations"].chunks is None


def test_large_activations_are_aligned_to_pages(tmp_path: Path) -> None:
    a_layout = layout([2000], block_bytes=2**20)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["activations"].id.get_offset() % 4096 == 0


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    written=st.integers(0, 200),
    block_bytes=st.integers(1, 150),
)
def test_a_writer_that_was_killed_leaves_a_file_that_another_one_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], written: int, block_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("kill")
    a_layout = layout(lengths, block_bytes=block_bytes)
    rows = rows_of(a_layout)
    write(folder / "whole.h5", a_layout, rows)
    with CacheWriter(folder / "killed.h5", a_layout) as writer:
        writer.write(rows[:written].numpy())
    assert writer.rows_done <= min(written, a_layout.rows)
    assert not (folder / "killed.h5").exists()
    write(folder / "killed.h5", a_layout, rows)
    assert (folder / "killed.h5").read_bytes() == (folder / "whole.h5").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["killed.h5", "whole.h5"]


def test_a_torn_journal_record_does_not_count(tmp_path: Path) -> None:
    a_layout = layout([30])
    rows = rows_of(a_layout)
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        writer.write(rows.numpy())
        whole_blocks = len(rows) * 6 // 100
        assert writer.rows_done == whole_blocks * 100 // 6
    journal = tmp_path / "c.h5.journal"
    with journal.open("ab") as file:
        file.write(b"torn")
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        assert writer.rows_done == whole_blocks * 100 // 6
    content = bytearray(journal.read_bytes())
    content[-1] ^= 1
    journal.write_bytes(content)
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        assert writer.rows_done == (whole_blocks - 1) * 100 // 6


def test_a_half_written_file_of_another_fingerprint_is_begun_anew(tmp_path: Path) -> None:
    a_layout = layout([30])
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        writer.write(rows_of(a_layout).numpy())
    with CacheWriter(tmp_path / "c.h5", replace(a_layout, fingerprint="0" * 64)) as writer:
        assert writer.rows_done == 0


def test_an_incomplete_file_is_neither_sealed_nor_read(tmp_path: Path) -> None:
    a_layout = layout([30])
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        writer.write(rows_of(a_layout)[:20].numpy())
        with pytest.raises(CacheError, match=r"of 30 rows"):
            writer.seal()
    os.rename(tmp_path / "c.h5.part", tmp_path / "c.h5")
    with pytest.raises(CacheError, match="never completed"):
        ActivationCache(tmp_path / "c.h5")


def test_a_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    a_layout = layout([50, 50])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with h5py.File(tmp_path / "c.h5") as file:
        offset = file["activations"].id.get_offset()
    content = bytearray((tmp_path / "c.h5").read_bytes())
    content[offset + 250] ^= 8
    (tmp_path / "c.h5").write_bytes(content)
    with ActivationCache(tmp_path / "c.h5") as cache, pytest.raises(CacheError, match=r"Block 2 of .*c\.h5 is damaged"):
        cache.verify()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    a_layout = layout([500])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    os.truncate(tmp_path / "c.h5", (tmp_path / "c.h5").stat().st_size - 100)
    with pytest.raises(CacheError, match=r"c\.h5"):
        ActivationCache(tmp_path / "c.h5")


@pytest.mark.parametrize("content", [b"", b"no HDF5 at all"])
def test_a_file_that_is_no_cache_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.h5").write_bytes(content)
    with pytest.raises(CacheError, match="not a readable HDF5 file"):
        ActivationCache(tmp_path / "c.h5")


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    a_layout = layout([5])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(CacheError, match="version 99"):
        ActivationCache(tmp_path / "c.h5")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"nothing\.h5 is missing"):
        ActivationCache(tmp_path / "nothing.h5")


def test_a_sealed_file_is_never_overwritten(tmp_path: Path) -> None:
    a_layout = layout([5])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with pytest.raises(CacheError, match="sealed already"):
        CacheWriter(tmp_path / "c.h5", a_layout)


def test_a_full_disk_is_met_before_the_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheError, match="No room is left"):
        CacheWriter(tmp_path / "c.h5", layout([5]))
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_the_file_is_sealed_costs_nothing(tmp_path: Path) -> None:
    a_layout = layout([50])
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        writer.write(rows_of(a_layout).numpy())
        done = writer.rows_done
    # A process that dies with the file open for writing, after a flush: what sealing does before the rename.
    script = "import h5py, os, sys; f = h5py.File(sys.argv[1], 'r+', locking=False); f.flush(); os._exit(9)"
    subprocess.run([sys.executable, "-c", script, tmp_path / "c.h5.part"], check=False)
    with CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        assert writer.rows_done == done > 0


@pytest.mark.parametrize("name", ["split", "activations", "labels/speaker"])
def test_a_link_into_another_file_is_refused(tmp_path: Path, name: str) -> None:
    a_layout = layout([5, 5])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    write(tmp_path / "other.h5", a_layout, rows_of(a_layout))
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink("other.h5", name)
    with pytest.raises(CacheError, match=f"{name} is missing or stored in a way"):
        ActivationCache(tmp_path / "c.h5")


def test_a_file_without_its_offsets_is_refused(tmp_path: Path) -> None:
    a_layout = layout([5, 5])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        del file["offsets"]
    with pytest.raises(CacheError, match="offsets is missing"):
        ActivationCache(tmp_path / "c.h5")

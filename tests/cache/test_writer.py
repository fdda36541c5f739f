"""The writer: whatever stops it, the next one ends with the same bytes."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cache import layout, read_all, rows_of, seal, write

from layerwise.cache import ActivationCache, CacheWriter
from layerwise.cache.dtypes import as_array
from layerwise.cache.layout import spans
from layerwise.errors import CacheError


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "int8"]),
    stops=st.lists(st.integers(0, 100), max_size=4),
    block_bytes=st.integers(8, 150),
    chain_blocks=st.integers(1, 9),
    append_bytes=st.integers(1, 400),
    scale_rows=st.integers(1, 20),
)
def test_a_writer_that_was_stopped_leaves_a_file_that_another_one_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    dtype: str,
    stops: list[int],
    block_bytes: int,
    chain_blocks: int,
    append_bytes: int,
    scale_rows: int,
) -> None:
    folder = tmp_path_factory.mktemp("stopped")
    a_layout = layout(lengths, dtype, block_bytes=block_bytes, chain_blocks=chain_blocks, scale_rows=scale_rows)
    rows = rows_of(a_layout)
    write(folder / "whole.h5", a_layout, rows)
    done = 0
    for stop in stops:
        with CacheWriter(folder / "stopped.h5", a_layout, append_bytes) as writer:
            assert writer.rows_done == done
            writer.write(as_array(rows[done : done + stop]))
            handed_over = min(done + stop, a_layout.rows)
        done = writer.rows_done
        assert done <= handed_over
        assert not (folder / "stopped.h5").exists()
    write(folder / "stopped.h5", a_layout, rows, append_bytes=append_bytes)
    assert (folder / "stopped.h5").read_bytes() == (folder / "whole.h5").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["stopped.h5", "whole.h5"]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "int8"]),
    starts=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 100)), max_size=4),
    block_bytes=st.integers(8, 150),
    chain_blocks=st.integers(1, 9),
    append_bytes=st.integers(1, 400),
    scale_rows=st.integers(1, 20),
    last=st.integers(1, 5),
)
def test_writers_that_share_a_file_end_it_with_the_bytes_of_one(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    dtype: str,
    starts: list[tuple[int, int]],
    block_bytes: int,
    chain_blocks: int,
    append_bytes: int,
    scale_rows: int,
    last: int,
) -> None:
    folder = tmp_path_factory.mktemp("shared")
    a_layout = layout(lengths, dtype, block_bytes=block_bytes, chain_blocks=chain_blocks, scale_rows=scale_rows)
    rows, path = rows_of(a_layout), folder / "shared.h5"
    write(folder / "whole.h5", a_layout, rows)
    # Each start stops after some rows of each writer, and may have another number of them than the one before.
    for writers, stop in [*starts, (last, a_layout.rows)]:
        for number in range(writers):
            with CacheWriter(path, a_layout, append_bytes, writer=number, writers=writers) as writer:
                writer.write(as_array(rows[writer.rows_done : min(writer.rows_done + stop, writer.rows_stop)]))
                if stop == a_layout.rows:
                    writer.finish()
    with CacheWriter(path, a_layout, append_bytes, writer=0, writers=last) as writer:
        seal(writer)
    assert path.read_bytes() == (folder / "whole.h5").read_bytes()
    assert sorted(each.name for each in folder.iterdir()) == ["shared.h5", "whole.h5"]


@given(rows=st.integers(0, 300), chain_blocks=st.integers(1, 40), count=st.integers(1, 9))
def test_spans_are_the_whole_in_order_and_two_never_share_a_journal(rows: int, chain_blocks: int, count: int) -> None:
    a_layout = layout([rows], block_bytes=16, chain_blocks=chain_blocks)
    parts = spans(a_layout, count)
    assert [block for span in parts for block in range(span.first, span.stop)] == list(range(a_layout.blocks))
    assert all(span.first % chain_blocks == 0 for span in parts if span.first < span.stop)
    for number, span in enumerate(parts):
        others = parts[:number] + parts[number + 1 :]
        assert span.first == span.stop or span.first not in [other.first for other in others]


def test_writers_without_blocks_leave_those_of_others_alone(tmp_path: Path) -> None:
    a_layout = layout([100], chain_blocks=10)  # one chain
    rows, path = as_array(rows_of(a_layout)), tmp_path / "c.h5"
    with CacheWriter(path, a_layout, 1, writer=0, writers=3) as first:
        first.write(rows[:30])
        for number in (1, 2):
            with CacheWriter(path, a_layout, 1, writer=number, writers=3) as other:
                assert other.rows_done == other.rows_stop
                first.write(rows[30 * number : 30 * number + 30])
                other.finish()
        first.write(rows[90:])
        seal(first)
    assert torch.equal(read_all(path), rows_of(a_layout))


def test_a_file_that_lacks_the_rows_of_another_writer_is_not_sealed(tmp_path: Path) -> None:
    a_layout = layout([100])
    rows = rows_of(a_layout)
    with CacheWriter(tmp_path / "c.h5", a_layout, 1, writer=0, writers=2) as writer:
        writer.write(as_array(rows[: writer.rows_stop]))
        with pytest.raises(CacheError, match="lacks blocks 3 to 6; start the run again"):
            seal(writer)
    assert rows_done(tmp_path / "c.h5", a_layout) == 300 // 6  # one writer goes on behind the first of the two


def test_a_torn_journal_record_does_not_count(tmp_path: Path) -> None:
    a_layout = layout([100])
    half_written(tmp_path / "c.h5", a_layout)
    journal = tmp_path / "c.h5.journal"
    with journal.open("ab") as file:
        file.write(b"torn")
    assert rows_done(tmp_path / "c.h5", a_layout) == 600 // 6
    content = bytearray(journal.read_bytes())
    content[-1] ^= 1
    journal.write_bytes(content)
    assert rows_done(tmp_path / "c.h5", a_layout) == 500 // 6


def test_an_append_whose_checksums_are_not_those_of_the_journal_does_not_count(tmp_path: Path) -> None:
    a_layout = layout([100])
    half_written(tmp_path / "c.h5", a_layout)
    with h5py.File(tmp_path / "c.h5.part") as file:
        table = file["checksums"].id.get_offset()
    content = bytearray((tmp_path / "c.h5.part").read_bytes())
    content[table + 4 * 3] ^= 1
    (tmp_path / "c.h5.part").write_bytes(content)
    assert rows_done(tmp_path / "c.h5", a_layout) == 300 // 6


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "0" * 64},
        {"ids": ("other",)},
        {"dtype": "bfloat16"},
        {"block_bytes": 50},
        {"labels": {}, "labels_classes": {}},
    ],
)
def test_a_half_written_file_of_anything_else_is_begun_anew(tmp_path: Path, change: dict[str, object]) -> None:
    a_layout = layout([100])
    half_written(tmp_path / "c.h5", a_layout)
    assert rows_done(tmp_path / "c.h5", replace(a_layout, **change)) == 0


def test_a_half_written_file_that_is_damaged_is_begun_anew(tmp_path: Path) -> None:
    a_layout = layout([100])
    half_written(tmp_path / "c.h5", a_layout)
    os.truncate(tmp_path / "c.h5.part", 5000)
    assert rows_done(tmp_path / "c.h5", a_layout) == 0


def test_an_incomplete_file_is_not_sealed_and_goes_on(tmp_path: Path) -> None:
    a_layout = layout([30])
    rows = rows_of(a_layout)
    with CacheWriter(tmp_path / "c.h5", a_layout, append_bytes=100) as writer:
        writer.write(rows[:20].numpy())
        with pytest.raises(CacheError, match="has 16 of 30 rows"):
            seal(writer)
    write(tmp_path / "c.h5", a_layout, rows)
    assert torch.equal(read_all(tmp_path / "c.h5"), rows)


def test_an_incomplete_file_is_not_read(tmp_path: Path) -> None:
    half_written(tmp_path / "c.h5", layout([100]))
    os.rename(tmp_path / "c.h5.part", tmp_path / "c.h5")
    with pytest.raises(CacheError, match="never completed"):
        ActivationCache(tmp_path / "c.h5")


def test_a_sealed_file_is_never_overwritten(tmp_path: Path) -> None:
    a_layout = layout([5])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with pytest.raises(CacheError, match="sealed already"):
        CacheWriter(tmp_path / "c.h5", a_layout)


def test_a_kill_while_the_file_is_sealed_costs_nothing(tmp_path: Path) -> None:
    a_layout = layout([100])
    half_written(tmp_path / "c.h5", a_layout)
    # A process that dies with the file open for writing, after a flush: what sealing does before the rename.
    script = "import h5py, os, sys; f = h5py.File(sys.argv[1], 'r+', locking=False); f.flush(); os._exit(9)"
    subprocess.run([sys.executable, "-c", script, tmp_path / "c.h5.part"], check=False)
    assert rows_done(tmp_path / "c.h5", a_layout) == 100


@pytest.mark.parametrize("step", ["pwrite", "fsync", "replace", "unlink"])
def test_a_stop_between_two_steps_of_sealing_ends_with_the_same_bytes(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_layout = layout([100])
    write(tmp_path / "whole.h5", a_layout, rows_of(a_layout))
    half_written(tmp_path / "c.h5", a_layout)

    def stop(*arguments: object, **named: object) -> None:
        raise OSError(errno.EIO, "stopped here")

    with monkeypatch.context() as patched, CacheWriter(tmp_path / "c.h5", a_layout) as writer:
        patched.setattr(os, step, stop)
        with pytest.raises(CacheError, match="stopped here"):
            seal(writer)
    if not (tmp_path / "c.h5").exists():
        write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    assert (tmp_path / "c.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.parametrize("frame_shape", [(3,), (300,)])
def test_a_full_disk_is_met_before_the_first_row(small_disk: Path, frame_shape: tuple[int, ...]) -> None:
    """Where the index itself does not fit, and where the activations do not."""
    a_layout = replace(layout([2**20 // frame_shape[0]]), frame_shape=frame_shape)
    with pytest.raises(CacheError, match="No room is left on the disk"):
        CacheWriter(small_disk / "c.h5", a_layout)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_while_rows_are_written_costs_nothing(small_disk: Path, tmp_path: Path) -> None:
    a_layout = layout([20000], block_bytes=4096)
    rows = rows_of(a_layout)
    with CacheWriter(small_disk / "c.h5", a_layout, append_bytes=4096) as writer:
        # The room of the activations is claimed: the journal is what finds no room.
        with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        with pytest.raises(CacheError, match="No room is left on the disk"):
            writer.write(rows.numpy())
            seal(writer)
    (small_disk / "filler").unlink()
    write(small_disk / "c.h5", a_layout, rows)
    write(tmp_path / "c.h5", a_layout, rows)
    assert (small_disk / "c.h5").read_bytes() == (tmp_path / "c.h5").read_bytes()


def test_a_failure_of_the_thread_comes_out_and_a_later_writer_goes_on(tmp_path: Path) -> None:
    a_layout = layout([20000], block_bytes=4096)
    rows = rows_of(a_layout)
    threads = threading.active_count()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(CacheError, match=r"c\.h5\.part cannot be written: File too large"):  # noqa: SIM117
        with CacheWriter(tmp_path / "c.h5", a_layout, append_bytes=8192) as writer:
            half = (tmp_path / "c.h5.part").stat().st_size - 60_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, old[1]))
            try:
                for piece in np.split(rows.numpy(), 100):
                    writer.write(piece)
                seal(writer)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert 0 < writer.rows_done < 20000
    assert threading.active_count() == threads
    write(tmp_path / "c.h5", a_layout, rows)
    write(tmp_path / "whole.h5", a_layout, rows)
    assert (tmp_path / "c.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_failure_of_the_thread_comes_out_when_the_block_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_layout = layout([100])

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheError, match="No room is left"), CacheWriter(tmp_path / "c.h5", a_layout, 600) as writer:
        monkeypatch.setattr(os, "fdatasync", full)
        writer.write(rows_of(a_layout).numpy())


def test_the_caller_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_layout = layout([100])
    disk, sync = threading.Event(), os.fdatasync

    def slow(descriptor: int) -> None:
        disk.wait()
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    with CacheWriter(tmp_path / "c.h5", a_layout, append_bytes=100) as writer:
        writer.write(rows_of(a_layout)[:33].numpy())
        assert writer.rows_done == 0
        disk.set()
    assert writer.rows_done == 16


@pytest.mark.parametrize("refuses", ["open", "pwrite"])
def test_a_file_system_without_direct_writes_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    a_layout = layout([5000], block_bytes=4096)
    write(tmp_path / "whole.h5", a_layout, rows_of(a_layout), append_bytes=8192)
    allowed, refused = getattr(os, refuses), []

    def without_direct(target: object, argument: object, *more: object) -> object:
        flags = argument if refuses == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            refused.append(target)
            raise OSError(errno.EINVAL, "Invalid argument")
        return allowed(target, argument, *more)

    monkeypatch.setattr(os, refuses, without_direct)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout), append_bytes=8192)
    assert refused
    assert (tmp_path / "c.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    a_layout = layout([60000], block_bytes=4096)
    write(tmp_path / "whole.h5", a_layout, rows_of(a_layout))
    path, journal = tmp_path / "c.h5", tmp_path / "c.h5.journal"
    context = multiprocessing.get_context("fork")
    kills = 0
    for records in (1, 20, 40, 60):
        process = context.Process(target=write, args=(path, a_layout, rows_of(a_layout)), kwargs={"pieces": 1000})
        process.start()
        while process.is_alive() and not (journal.exists() and journal.stat().st_size >= 16 * records):
            time.sleep(0.0005)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > 0
    if not path.exists():
        write(path, a_layout, rows_of(a_layout))
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match="cannot be written"):
        CacheWriter(tmp_path / "file" / "c.h5", layout([5]))


def half_written(path: Path, a_layout: object) -> None:
    """Every row of 100, in six appends of one block, but not sealed."""
    with CacheWriter(path, a_layout, append_bytes=100) as writer:
        writer.write(rows_of(a_layout).numpy())
    assert writer.rows_done == 100


def rows_done(path: Path, a_layout: object) -> int:
    with CacheWriter(path, a_layout) as writer:
        return writer.rows_done

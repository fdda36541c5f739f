"""Files are written whole, by one process at a time, never through a link; and only plain files of a sane size are read."""

import errno
import fcntl
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from layerwise.errors import LayerwiseError, RunError, UnreadableFile
from layerwise.files import (
    check_readable,
    exclusive,
    is_locked,
    json_lines,
    open_new,
    open_own,
    open_to_append,
    read_bytes,
    unwritable,
    write_atomically,
)
from layerwise.report.progress import LogFile

BUSY = RunError("Another process is at it.")


def append(path: Path) -> None:
    with open_to_append(path) as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    with open_own(path) as file:
        file.write(b"other")


def lock(path: Path) -> None:
    with exclusive(path, BUSY):
        pass


def log(path: Path) -> None:
    (path.parent / "run.json").touch()
    LogFile(path).write("a line")


WRITE: dict[str, Callable[[Path], object]] = {
    "new": lambda path: open_new(path, BUSY).close(),
    "append": append,
    "rewrite": rewrite,
    "lock": lock,
    "log": log,
    "whole": lambda path: write_atomically(path, b"content"),
    "temporary": lambda path: write_atomically(path.with_suffix(""), b"content"),
}


@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_nothing_is_written_through_a_link(tmp_path: Path, write: Callable[[Path], object], link: Callable) -> None:
    theirs, planted = tmp_path / "theirs", tmp_path / "x.tmp"
    theirs.write_bytes(b"theirs")
    link(theirs, planted)
    try:
        write(planted)
    except (OSError, LayerwiseError) as error:
        assert "a link" in (unwritable(planted, error) if isinstance(error, OSError) else str(error))
    assert theirs.read_bytes() == b"theirs"


def test_what_is_appended_to_a_linked_copy_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "original").write_bytes(b"text")
    os.link(tmp_path / "original", tmp_path / "copy")
    append(tmp_path / "copy")
    assert ((tmp_path / "copy").read_bytes(), (tmp_path / "original").read_bytes()) == (b"textmore", b"text")


def test_a_second_writer_of_a_file_is_told_so_and_a_leftover_is_not_in_the_way(tmp_path: Path) -> None:
    path, beside = tmp_path / "x.part", tmp_path / "x.index"
    for each in (path, beside):
        each.write_bytes(b"what a kill has left")
    with open_new(path, BUSY, leftovers=[beside]) as file:
        file.write(b"whole")
        assert not beside.exists()
        with pytest.raises(RunError, match="Another process is at it"):
            open_new(path, BUSY)
        with pytest.raises(RunError, match=r"Another process is writing .*x;"):
            os.link(path, tmp_path / "x.tmp")
            write_atomically(tmp_path / "x", b"")
    assert path.read_bytes() == b"whole"


def test_of_many_processes_one_at_a_time_makes_the_file(tmp_path: Path) -> None:
    """Each that gets it writes its own number twice, and gives the file its name; no other number may come between."""

    def make(number: int) -> None:
        for _ in range(50):
            try:
                with open_new(tmp_path / "x.part", BUSY) as file:
                    for _ in range(2):
                        file.write(bytes([number]))
                        file.flush()
                    os.replace(tmp_path / "x.part", tmp_path / "x")
            except RunError:
                continue
            first, second = (tmp_path / "x").read_bytes()
            assert first == second

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_lock_file_that_was_replaced_is_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock = tmp_path / "lock", fcntl.flock

    def replaced_meanwhile(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    with exclusive(path, BUSY):
        assert is_locked(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "too large"])
def test_what_is_no_plain_file_of_a_sane_size_is_a_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "too large":
            path.touch()
            os.truncate(path, 2**40)
    for read in (read_bytes, json_lines, lambda path: check_readable(path, 100)):
        with pytest.raises(UnreadableFile, match="has more than" if kind == "too large" else "cannot be read: "):
            read(path)
    assert not is_locked(path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "missing")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No room is left"),
        (errno.EDQUOT, "No room is left"),
        (errno.EFBIG, "too large; raise that limit"),
    ],
)
def test_a_disk_that_takes_no_more_is_a_sentence(tmp_path: Path, number: int, said: str) -> None:
    assert said in unwritable(tmp_path, OSError(number, os.strerror(number)))

"""What is written is on the disk before anything counts on it: data before their journal, and both before a name.

A kill cannot show it, since the system keeps what a dead process has written; only a power cut would.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_cache import layout, rows_of, seal

from layerwise.cache import CacheWriter
from layerwise.cache.dtypes import as_array
from layerwise.files import write_atomically


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every write, sync and rename from now on, with the name of the file; of a rename the old one."""
    made: list[tuple[str, str]] = []

    def noted(kind: str, function: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            made.append((kind, name_of(*arguments)))
            return function(*arguments)

        return call

    def opened(descriptor: int, *_: object) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    for name, kind in (("pwrite", "write"), ("fsync", "sync"), ("fdatasync", "sync")):
        monkeypatch.setattr(os, name, noted(kind, getattr(os, name), opened))
    monkeypatch.setattr(os, "replace", noted("rename", os.replace, lambda old, new: os.path.basename(old)))
    return made


def test_a_file_is_durable_before_it_takes_its_name_and_the_name_before_the_call_returns(
    calls: list[tuple[str, str]], tmp_path: Path
) -> None:
    write_atomically(tmp_path / "file", b"content")
    assert calls == [("sync", "file.tmp"), ("rename", "file.tmp"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_rows_of_a_cache_are_durable_before_its_journal_says_so_and_all_of_it_before_its_name(
    calls: list[tuple[str, str]], tmp_path: Path, compression: str
) -> None:
    if compression == "zstd":
        pytest.importorskip("zstandard")
    a_layout = layout([100])
    with CacheWriter(tmp_path / "c.h5", a_layout, append_bytes=1, compression=compression) as writer:
        writer.write(as_array(rows_of(a_layout)))
        writer.finish()  # labels of frames may be written while rows still are, and count with the seal
        seal(writer)
    journal, unsynced = "c.h5.journal", set()
    for kind, name in calls:
        if kind == "write":
            assert name != journal or not unsynced - {journal}, "the journal was written before what it speaks of"
            unsynced.add(name)
        elif kind == "sync":
            unsynced.discard(name)
        else:
            assert name not in unsynced, f"{name} was not durable when it took the name of the cache"
    assert ("write", journal) in calls
    whole = "c.h5.part" if compression == "none" else "c.h5.packing"
    assert calls[-2:] == [("rename", whole), ("sync", tmp_path.name)]

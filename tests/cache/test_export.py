"""Hand features over: disks that fill up, two writers of one file, kills, and samples of which there is nothing."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from small_cache import layout, rows_of, write

from layerwise.cache import ActivationCache
from layerwise.cache.export import FeatureFile, export
from layerwise.commands import main
from layerwise.errors import CacheError


def in_a_process(work: Callable[[], object]) -> int | None:
    """The exit code of the work in a process of its own: one that HDF5 or a memory map ends would end the tests, too."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def large_cache(folder: Path) -> Path:
    """Of 3 MiB."""
    a_layout = replace(layout([400]), frame_shape=(4096,))
    write(folder / "c.h5", a_layout, torch.zeros(400, 4096, dtype=torch.float16), append_bytes=2**20)
    return folder / "c.h5"


@pytest.mark.parametrize("ending", ["npy", "h5"])
def test_an_export_that_the_disk_does_not_hold_is_a_sentence(
    tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str], ending: str
) -> None:
    command = ["cache", "export", str(large_cache(tmp_path)), "-o", str(small_disk / f"x.{ending}")]
    for free in (0, 1, 16, 64):
        filler = small_disk / "filler"
        filler.write_bytes(bytes(2**20 - 4096 * free))
        assert in_a_process(partial(main, command)) == 2
        assert "No room is left on the disk for" in capfd.readouterr().err
        assert list(small_disk.iterdir()) == [filler]


@pytest.mark.parametrize("ending", ["npy", "h5"])
def test_an_export_that_is_larger_than_files_may_be_is_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], ending: str
) -> None:
    command = ["cache", "export", str(large_cache(tmp_path)), "-o", str(tmp_path / f"x.{ending}")]
    for most in (4096, 2**20):

        def limited(most: int = most) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            main(command)

        assert in_a_process(limited) == 2
        assert "File too large; raise that limit" in capfd.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["c.h5"]


@pytest.mark.parametrize("ending", ["npy", "h5"])
def test_two_writers_of_one_file_do_not_mix(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    with FeatureFile(path, (2,), np.dtype(np.float32), 1) as first:
        first.append(np.ones((3, 2), np.float32))
        with pytest.raises(
            CacheError, match=rf"Another process is writing .*x\.{ending}; wait for it, or name another"
        ):
            FeatureFile(path, (2,), np.dtype(np.float32), 2)
        first.keep("a")
        first.finish({})
    with pytest.raises(CacheError, match="exists; delete it, or name another file"):
        FeatureFile(path, (2,), np.dtype(np.float32), 2)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.index.npz"] * (ending == "npy") + [path.name]


@pytest.mark.parametrize("ending", ["npy", "h5"])
def test_what_a_kill_leaves_is_cleared_by_the_same_command(tmp_path: Path, ending: str) -> None:
    """Killed at the last moment: the index has its name, the features have not."""
    a_layout = layout([3, 4])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / f"x.{ending}"

    def export_it(kill: bool) -> None:
        if kill:
            Path.rename = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        main(["cache", "export", str(tmp_path / "c.h5"), "-o", str(output)])

    assert in_a_process(partial(export_it, True)) == -signal.SIGKILL
    assert not output.exists()
    assert in_a_process(partial(export_it, False)) == 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["x.index.npz"] * (ending == "npy") + [output.name]


def test_an_index_of_somebody_elses_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "x.index.npz").write_bytes(b"theirs")
    with pytest.raises(CacheError, match=r"x\.index\.npz exists"):
        FeatureFile(tmp_path / "x.npy", (2,), np.dtype(np.float32), 1)
    assert (tmp_path / "x.index.npz").read_bytes() == b"theirs"
    assert not (tmp_path / "x.npy.part").exists()


@pytest.mark.parametrize("ending", ["npy", "h5"])
def test_the_mean_of_a_sample_without_frames_is_not_a_number(tmp_path: Path, ending: str) -> None:
    a_layout = layout([3, 0])
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout))
    with ActivationCache(tmp_path / "c.h5") as cache:
        export(cache, tmp_path / f"x.{ending}", mean=True)
    if ending == "npy":
        means = np.load(tmp_path / "x.npy")
    else:
        with h5py.File(tmp_path / "x.h5") as file:
            means = file["features"][:]
    assert np.array_equal(np.isnan(means), [[False] * 3, [True] * 3])

"""OutputFormat features over: disks that fill up, and samples of which there is nothing."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from small_cache import layout, rows_of, write

from layerwise.cache import ActivationCache
from layerwise.cache.export import export
from layerwise.commands import main


@pytest.mark.parametrize("ending", ["npy", "h5"])
def test_an_export_that_the_disk_does_not_hold_is_a_sentence(
    tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str], ending: str
) -> None:
    """In a process of its own: writing through a memory map would end it with a bus error."""
    a_layout = replace(layout([400]), frame_shape=(4096,))
    write(tmp_path / "c.h5", a_layout, torch.zeros(400, 4096, dtype=torch.float16), append_bytes=2**20)
    output = small_disk / f"x.{ending}"
    command = ["cache", "export", str(tmp_path / "c.h5"), "-o", str(output)]
    process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
    process.start()
    process.join()
    assert process.exitcode == 2
    assert "No room is left on the disk for" in capfd.readouterr().err
    assert list(small_disk.iterdir()) == []


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

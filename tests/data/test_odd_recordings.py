"""Recordings that would spoil the others are named at the start, wherever what is wrong with them lies."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from layerwise.data.speech import BLOCK_FRAMES, open_recordings

Write = Callable[..., np.ndarray]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(name, x, subtype="FLOAT"): a file; without x some noise, which it returns."""

    def write(name: str, x: np.ndarray | None = None, subtype: str = "FLOAT") -> np.ndarray:
        if x is None:
            x = 0.1 * np.random.default_rng(len(name)).standard_normal(4000)
        soundfile.write(tmp_path / name, x, 8000, subtype=subtype)
        return x

    return write


def reasons(folder: Path) -> dict[str, str]:
    return {entry.path: entry.reason for entry in open_recordings(folder, 8000).skipped}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("place", [0, 2000, BLOCK_FRAMES, -1])
def test_values_that_are_no_numbers_are_found_anywhere(write: Write, tmp_path: Path, value: float, place: int) -> None:
    for name in ("a.wav", "b.wav"):
        write(name)
    x = np.zeros((BLOCK_FRAMES + 100, 1 + (place == 2000)))
    x[place, -1] = value
    write("bad.wav", x, subtype="DOUBLE")
    seconds = (place if place >= 0 else len(x) - 1) / 8000
    expected = f"holds samples that are not numbers, the first at {seconds:.3f} s"
    before = open_recordings(tmp_path, 8000)
    assert [(entry.path, entry.reason) for entry in before.skipped] == [("bad.wav", expected)]
    (tmp_path / "bad.wav").unlink()
    assert open_recordings(tmp_path, 8000).identity == before.identity


@pytest.mark.parametrize("value", [2e3, 3e29, -3e38])
@pytest.mark.parametrize("subtype", ["FLOAT", "PCM_16"])
def test_an_absurd_level_is_named_and_moves_no_other(write: Write, tmp_path: Path, value: float, subtype: str) -> None:
    for name in ("a.wav", "bb.wav", "ccc.wav"):
        write(name, subtype=subtype)
    level = open_recordings(tmp_path, 8000).level
    x = write("absurd.wav")
    x[700:720] = value
    write("absurd.wav", x)
    data = open_recordings(tmp_path, 8000)
    assert data.level == level
    assert data.ids == ["a.wav", "bb.wav", "ccc.wav"]
    assert f"its samples reach {abs(value):.3g}" in data.skipped[0].reason


def test_two_recordings_are_enough_to_see_which_one_is_absurd(write: Write, tmp_path: Path) -> None:
    write("a.wav")
    write("b.wav", 1e9 * write("b.wav"))
    assert open_recordings(tmp_path, 8000).ids == ["a.wav"]


@pytest.mark.parametrize("scale", [1, 3e4, 1e-6])
def test_recordings_of_one_scale_are_all_taken(write: Write, tmp_path: Path, scale: float) -> None:
    for name, loud in (("a.wav", 1), ("bb.wav", 20), ("ccc.wav", 0), ("dddd.wav", 0.01)):
        write(name, scale * loud * write(name))
    assert reasons(tmp_path) == {}


def test_channels_that_cancel_are_named(write: Write, tmp_path: Path) -> None:
    x, y = write("mono.wav"), write("other.wav")
    silence = np.zeros(9000)
    channels = {
        "opposite.wav": [x, -x],
        "nearly.wav": [x, -0.95 * x],
        "four.wav": [x, y, -y, -x],
        "late.wav": [np.r_[silence, x], np.r_[silence, -x]],
        "independent.wav": [x, y],
        "the same.wav": [x, x],
        "one silent.wav": [x, 0 * x],
        "silent.wav": [0 * x, 0 * x],
    }
    for name, each in channels.items():
        write(name, np.stack(each, axis=1), subtype="PCM_16" if name == "opposite.wav" else "FLOAT")
    data = open_recordings(tmp_path, 8000)
    assert len(data.ids) == 10
    (note,) = data.notes
    assert "the channels of 4 recordings cancel" in note
    assert "four.wav, late.wav, nearly.wav, opposite.wav;" in note


def test_other_formats_are_named(write: Write, tmp_path: Path) -> None:
    write("a.wav")
    write("b.wav")
    (tmp_path / "c.M4A").write_bytes(b"anything")
    (tmp_path / "notes.txt").write_text("no recording")
    assert reasons(tmp_path) == {"c.M4A": "M4A is not read; convert it to WAV or FLAC"}

"""Recordings that would spoil the others are named at the start, and long ones at the latest when they are read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from layerwise.data.speech import BLOCK_FRAMES, open_recordings
from layerwise.errors import DataError

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


@pytest.mark.parametrize("second", [0.5, 25, 89.9])
def test_a_long_recording_is_looked_at_in_places_and_the_rest_when_it_is_read(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: float
) -> None:
    for name in ("a.wav", "b.wav"):
        write(name)
    x = np.zeros(90 * 8000)
    x[int(second * 8000)] = np.nan
    write("bad.wav", x)
    frames_read, decode = [], soundfile.SoundFile.read

    def counted(file: soundfile.SoundFile, *which: int, **how: object) -> np.ndarray:
        samples: np.ndarray = decode(file, *which, **how)
        frames_read.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    data = open_recordings(tmp_path, 8000)
    if second != 25:
        assert [entry.path for entry in data.skipped] == ["bad.wav"]
        return
    assert sum(frames_read) < len(x) / 4
    sample, start = data.ids.index("bad.wav"), int(second * 8000)
    data.read(sample, start + 1, start + 1000)
    with pytest.raises(DataError, match=r"bad\.wav holds .* not numbers, the first at 25\.000 s; repair or remove it"):
        data.read(sample, start - 1000, start + 1000)


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

"""Recordings of all kinds become samples; what cannot be used is named."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.data.speech import open_fsdd, open_librispeech, open_recordings
from layerwise.errors import ConfigError, DataError

Write = Callable[..., Path]


def whole(data: object, sample: int) -> torch.Tensor:
    return data.read(sample, 0, int(data.lengths[sample]))


def test_a_tree_of_formats_rates_and_channels_is_read(write_tone: Write, tmp_path: Path) -> None:
    write_tone("anna/a.wav", 0.3)
    write_tone("anna/deep/b.flac", 0.3, rate=16000)
    write_tone("ben/c.ogg", 0.5, rate=44100, channels=2)
    write_tone("ben/d.mp3", 0.5, rate=44100)
    (tmp_path / "ben/notes.txt").write_text("not a recording")
    data = open_recordings(tmp_path, rate=8000)
    assert data.ids == ["anna/a.wav", "anna/deep/b.flac", "ben/c.ogg", "ben/d.mp3"]
    assert data.labels["speaker"].tolist() == ["anna", "deep", "ben", "ben"]
    assert data.lengths.tolist()[:3] == [2400, 2400, 4000]
    for sample in range(4):
        samples = whole(data, sample)
        assert samples.shape == (data.lengths[sample], 1)
        assert samples.dtype == torch.float32


def test_the_level_of_the_set_is_one(write_tone: Write, tmp_path: Path) -> None:
    for name in ("a.wav", "bb.wav", "ccc.wav"):
        write_tone(name)
    data = open_recordings(tmp_path, rate=8000)
    assert torch.cat([whole(data, sample) for sample in range(3)]).square().mean().item() == pytest.approx(1, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([(8000, 16000), (44100, 16000), (48000, 16000), (16000, 8000), (11025, 8000)]))
def test_a_resampled_window_equals_the_resampled_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rates: tuple[int, int]
) -> None:
    file_rate, rate = rates
    folder = tmp_path_factory.mktemp("resample")
    noise = np.random.default_rng(0).standard_normal(file_rate // 10).astype(np.float32) * 0.1
    for name in ("a.wav", "b.wav"):
        soundfile.write(folder / name, noise, file_rate, subtype="FLOAT")
    recordings = open_recordings(folder, rate)
    length = int(recordings.lengths[0])
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    expected = torchaudio.functional.resample(torch.from_numpy(noise), file_rate, rate)
    assert len(expected) == length
    level = np.sqrt(np.square(noise, dtype=np.float64).mean())
    torch.testing.assert_close(
        recordings.read(0, start, stop)[:, 0] * level, expected[start:stop], rtol=1e-4, atol=1e-6
    )


def test_damaged_empty_and_short_recordings_are_named_and_skipped(write_tone: Write, tmp_path: Path) -> None:
    write_tone("good1.wav")
    write_tone("good2.wav")
    write_tone("short.wav", seconds=0.01)
    (tmp_path / "broken.flac").write_bytes(b"fLaC and then nothing")
    (tmp_path / "zero.wav").write_bytes(b"")
    for name in ("cut.wav", "cut.flac"):
        path = write_tone(name, seconds=2)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = open_recordings(tmp_path, rate=8000, shortest=400)
    assert data.ids == ["good1.wav", "good2.wav"]
    reasons = {entry.path: entry.reason for entry in data.skipped}
    assert reasons.keys() == {"short.wav", "broken.flac", "zero.wav", "cut.wav", "cut.flac"}
    assert "lasts 0.010 s" in reasons["short.wav"]
    assert "cut off" in reasons["cut.wav"]


def test_a_recording_that_changes_under_us_is_an_error_with_its_name(write_tone: Write, tmp_path: Path) -> None:
    path = write_tone("a.wav", seconds=1)
    write_tone("b.wav")
    data = open_recordings(tmp_path, rate=8000)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"a\.wav gave .* of 8000 samples"):
        whole(data, 0)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.wav cannot be read"):
        whole(data, 0)


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_recordings(tmp_path / "nowhere", 8000)
    with pytest.raises(DataError, match="holds no recordings"):
        open_recordings(tmp_path, 8000)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        open_recordings(tmp_path / "file", 8000)


def test_too_few_usable_recordings_are_an_error_that_names_a_bad_one(write_tone: Write, tmp_path: Path) -> None:
    write_tone("good.wav")
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"1 usable recordings and 1 unusable ones; the first: bad\.wav"):
        open_recordings(tmp_path, 8000)


def test_a_pattern_names_labels(write_tone: Write, tmp_path: Path) -> None:
    write_tone("x/anna_happy.wav")
    write_tone("x/ben.wav")
    data = open_recordings(tmp_path, 8000, r"(?P<speaker>[a-z]+)(_(?P<mood>\w+))?\.wav")
    assert data.labels["speaker"].tolist() == ["anna", "ben"]
    assert data.labels["mood"].tolist() == ["happy", ""]


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("(", ConfigError, "not a regular expression"),
        ("[a-z]+", ConfigError, "names no label"),
        (r"(?P<speaker>\d{9})", DataError, "matches no path"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(
    write_tone: Write, tmp_path: Path, pattern: str, error: type[Exception], message: str
) -> None:
    write_tone("a.wav")
    write_tone("b.wav")
    with pytest.raises(error, match=message):
        open_recordings(tmp_path, 8000, pattern)


def test_the_identity_follows_files_and_rate(write_tone: Write, tmp_path: Path) -> None:
    write_tone("a.wav")
    write_tone("b.wav")
    first = open_recordings(tmp_path, 8000).identity
    assert open_recordings(tmp_path, 8000).identity == first
    assert open_recordings(tmp_path, 16000).identity != first
    write_tone("c.wav")
    assert open_recordings(tmp_path, 8000).identity != first


def test_fsdd_has_its_labels_and_its_customary_split(fsdd: Path) -> None:
    data = open_fsdd(fsdd, 8000, shortest=1)
    assert len(data.ids) == 3000
    assert data.test.sum() == 300
    assert sorted(set(data.labels["digit"].tolist())) == [str(digit) for digit in range(10)]
    assert len(set(data.labels["speaker"].tolist())) == 6
    assert "index" not in data.labels
    assert data.skipped == []


def test_librispeech_is_read_from_its_tree(write_tone: Write, tmp_path: Path) -> None:
    for name in ("84/121123/84-121123-0000.flac", "84/121550/84-121550-0001.flac", "174/50561/174-50561-0002.flac"):
        write_tone(f"LibriSpeech/dev-clean/{name}", rate=16000)
    (tmp_path / "LibriSpeech/dev-clean/84/121123/84-121123.trans.txt").write_text("84-121123-0000 GO")
    data = open_librispeech(tmp_path, 16000, shortest=1)
    assert data.labels["speaker"].tolist() == ["174", "84", "84"]
    assert data.labels["chapter"].tolist() == ["50561", "121123", "121550"]


def test_a_folder_that_is_not_librispeech_is_refused(write_tone: Write, tmp_path: Path) -> None:
    write_tone("84/1/84-1-0000.flac")
    write_tone("84/1/odd.flac")
    with pytest.raises(DataError, match=r"odd\.flac is not named"):
        open_librispeech(tmp_path, 16000, shortest=1)


def test_a_name_that_is_not_utf8_is_skipped(write_tone: Write, tmp_path: Path) -> None:
    write_tone("a.wav")
    write_tone("b.wav")
    os.link(tmp_path / "a.wav", os.fsencode(tmp_path) + b"/caf\xe9.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    data = open_recordings(tmp_path, 8000)
    assert data.ids == ["a.wav", "b.wav"]
    assert sorted(entry.reason for entry in data.skipped) == ["its name is not valid UTF-8", "not a regular file"]

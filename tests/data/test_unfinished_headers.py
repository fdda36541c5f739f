"""WAV files whose headers were never finished: those of a pipe are read to their end, those that were cut off are named."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from layerwise.data.speech import open_recordings
from layerwise.data.wav import data_chunk

COUNT = 3001
KINDS = {
    "riff": {"format": "WAV"},
    "rifx": {"format": "WAV", "endian": "BIG"},
    "extensible": {"format": "WAVEX"},
    "rf64": {"format": "RF64"},
    "w64": {"format": "W64"},
}
Write = Callable[..., bytearray]


@pytest.fixture
def sound() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(COUNT)).astype(np.float32)


def written(path: Path, sound: np.ndarray, kind: str) -> bytearray:
    soundfile.write(path, sound, 8000, subtype="PCM_16", **KINDS[kind])
    return bytearray(path.read_bytes())


def with_size(content: bytearray, path: Path, kind: str, size: int) -> bytearray:
    """The same with this size of the sound, and one that fits to it of the whole."""
    chunk = data_chunk(path)
    layout = chunk.size_layout
    most = 2 ** (8 * struct.calcsize(layout)) - 1
    struct.pack_into(layout, content, chunk.size_at, min(size, most))
    if kind == "w64":
        struct.pack_into("<Q", content, 16, min(size + 128, most))
    elif kind == "rf64":
        struct.pack_into("<Q", content, content.index(b"ds64") + 8, min(size + 72, most))
    else:
        struct.pack_into(layout, content, 4, (size + 36) & 0xFFFFFFFF)
    return content


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 0x7FFFEFFF, 0x7FFFF000, 0x7FFFFFDB, 0x7FFFFFFF, 0x80000000, 0x80000024, 2**64 - 1])
def test_a_recording_from_a_pipe_is_read_to_its_end(tmp_path: Path, sound: np.ndarray, kind: str, size: int) -> None:
    for name in ("a.wav", "b.wav"):
        content = written(tmp_path / name, sound, kind)
        (tmp_path / name).write_bytes(with_size(content, tmp_path / name, kind, size))
    data = open_recordings(tmp_path, 8000)
    assert data.skipped == []
    assert data.lengths.tolist() == [COUNT, COUNT]
    read = data.read(1, 0, COUNT)[:, 0].numpy() * data.level
    np.testing.assert_allclose(read, sound, atol=2**-15)
    assert np.array_equal(data.read(0, 1000, 1500)[:, 0].numpy() * np.float32(data.level), read[1000:1500])


@pytest.mark.parametrize("size", [0, 0x7FFFFFFE, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF - 36])
@pytest.mark.parametrize(("subtype", "channels", "more"), [("PCM_24", 2, 5), ("FLOAT", 3, 1), ("ULAW", 2, 1)])
def test_whatever_its_samples_are_and_though_the_last_one_is_not_whole(
    tmp_path: Path, sound: np.ndarray, size: int, subtype: str, channels: int, more: int
) -> None:
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.stack([sound] * channels, axis=1), 8000, subtype=subtype)
        content = bytearray((tmp_path / name).read_bytes())
        (tmp_path / name).write_bytes(with_size(content, tmp_path / name, "riff", size) + bytes(more))
    data = open_recordings(tmp_path, 8000)
    assert (data.skipped, data.lengths.tolist()) == ([], [COUNT, COUNT])
    np.testing.assert_allclose(data.read(0, 0, COUNT)[:, 0].numpy() * data.level, sound, atol=0.02)


@pytest.mark.parametrize("kind", ["riff", "rifx"])
def test_a_size_of_zero_alone_is_seen_through(tmp_path: Path, sound: np.ndarray, kind: str) -> None:
    """Though the size of the whole file is right."""
    for name in ("a.wav", "b.wav"):
        content = written(tmp_path / name, sound, kind)
        chunk = data_chunk(tmp_path / name)
        struct.pack_into(chunk.size_layout, content, chunk.size_at, 0)
        (tmp_path / name).write_bytes(content)
    assert open_recordings(tmp_path, 8000).lengths.tolist() == [COUNT, COUNT]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, sound: np.ndarray, kind: str, part: float) -> None:
    for name in ("a.wav", "b.wav", "cut.wav"):
        content = written(tmp_path / name, sound, kind)
    (tmp_path / "cut.wav").write_bytes(content[: int(len(content) * part)])
    data = open_recordings(tmp_path, 8000)
    assert data.ids == ["a.wav", "b.wav"]
    assert [(entry.path, entry.reason) for entry in data.skipped] == [("cut.wav", "is cut off")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_sound_holds_none_whatever_stands_behind(tmp_path: Path, sound: np.ndarray, kind: str) -> None:
    for name in ("a.wav", "b.wav"):
        written(tmp_path / name, sound, kind)
    soundfile.write(tmp_path / "empty.wav", sound[:0], 8000, subtype="PCM_16", **KINDS[kind])
    if kind in ("riff", "rifx"):
        more = struct.pack(f"{'<' if kind == 'riff' else '>'}4sI4s", b"LIST", 4, b"INFO")
        (tmp_path / "list.wav").write_bytes((tmp_path / "empty.wav").read_bytes() + more)
    data = open_recordings(tmp_path, 8000)
    assert data.ids == ["a.wav", "b.wav"]
    assert {entry.reason for entry in data.skipped} == {"holds no sound"}


def test_nonsense_in_a_header_is_no_endless_walk(tmp_path: Path) -> None:
    path = tmp_path / "odd.wav"
    for size in (0, 1, 23, 0xFFFFFFFF):
        w64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00" + bytes(24) + b"junk" + bytes(12)
        path.write_bytes(w64 + struct.pack("<Q", size) + bytes(100))
        assert data_chunk(path) is None
        path.write_bytes(b"RIFF" + struct.pack("<I", size) + b"WAVEjunk" + struct.pack("<I", size) + bytes(101))
        assert data_chunk(path) is None
    for content in (b"", b"RIFF", b"RF64\xff\xff\xff\xffWAVEds64\x10\0\0\0\0"):
        path.write_bytes(content)
        assert data_chunk(path) is None

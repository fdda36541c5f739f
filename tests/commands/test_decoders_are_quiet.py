"""What decoders print about odd files stays off the screen; what layerwise says does not."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import soundfile
from forked_python import ForkedPython
from PIL import Image

from layerwise.data.speech import open_recordings
from layerwise.screen import quiet

ODD_TAG = b"ID3\x03\x00\x00\x00\x00\x00\x1eCOMM\x00\x00\x00\x05\x00\x00\x00eng\xff\xfe\x00" + bytes(20)
"""A comment without text, of which the decoder of MP3 complains whenever the file is opened."""


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    for name in ("a.mp3", "b.mp3"):
        soundfile.write(tmp_path / name, 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
        (tmp_path / name).write_bytes(ODD_TAG + (tmp_path / name).read_bytes())
    return tmp_path


def test_an_odd_recording_is_read_in_silence(recordings: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with soundfile.SoundFile(recordings / "a.mp3"):
        assert "error" in capfd.readouterr().err, "the decoder no longer says anything, and this test tests nothing"
    data = open_recordings(recordings, 16_000)
    data.read(0, 10, 20)
    assert (data.skipped, capfd.readouterr().err) == ([], "")


OF_THE_DECODER = (
    b"[src/libmpg123/layer3.c:INT123_do_layer3():1774] error: part2_3_length (928) too large\n"
    b"Note: Illegal Audio-MPEG-Header 0x12cd2215 at offset 4392.\n"
    b"Warning: Xing stream size off by more than 1%, fuzzy seeking may be even more fuzzy than by design!\n"
)


def test_what_others_print_meanwhile_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    def work(number: int) -> None:
        with quiet():
            os.write(2, OF_THE_DECODER)
            # Not print: it writes the end of a line by itself, and other threads come in between.
            sys.stderr.write(f"Python {number}\n")
            os.write(2, f"native {number}\n".encode())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(20)))
    os.write(2, OF_THE_DECODER)
    said = [f"{who} {number}" for who in ("Python", "native") for number in range(20)]
    assert sorted(capfd.readouterr().err.splitlines()) == sorted([*said, *OF_THE_DECODER.decode().splitlines()])


def test_a_command_says_what_it_has_to_and_nothing_else(recordings: Path) -> None:
    soundfile.write(recordings / "cut.mp3", 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    (recordings / "cut.mp3").write_bytes((recordings / "cut.mp3").read_bytes()[:1500])
    command = [sys.executable, "-m", "layerwise", "init", "--data", f"speech:{recordings}", "-o"]
    for name, code, said in (("mine.toml", 0, ""), ("mine.toml", 2, "layerwise: ")):
        process = ForkedPython([*command, str(recordings / name)], stdout=PIPE, stderr=PIPE, text=True)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert err.startswith(said)
        assert len(err.splitlines()) == code // 2
        assert code or "1 files skipped" in out


def test_warnings_about_pictures_do_not_reach_the_screen(tmp_path: Path) -> None:
    cut_off = b"Exif\0\0II*\0\x08\0\0\0\x05\0"
    for name in ("a.jpg", "b.jpg"):
        Image.new("L", (96, 96)).save(tmp_path / name, exif=cut_off)
    with pytest.warns(UserWarning, match="EXIF"):  # or else this test tests nothing
        Image.open(tmp_path / "a.jpg").close()
    command = ["init", "--data", f"images:{tmp_path}", "-o", str(tmp_path / "mine.toml")]
    process = ForkedPython([sys.executable, "-m", "layerwise", *command], stdout=PIPE, stderr=PIPE, text=True)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")

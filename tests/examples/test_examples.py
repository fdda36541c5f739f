"""The examples, run as a reader would, on small input."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

Show = Callable[..., str]


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """show(name, *arguments): what the example prints, run as the main program of this process in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_sensor_stream_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "sensor_stream.py"), "--seconds", "20", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "features (1, 39, 64)" in done.stdout


def test_volumes(show: Show) -> None:
    assert "features (1, 1, 64)" in show("volumes.py", "--side", 16, "--volumes", 40, "--epochs", 1)


@pytest.mark.usefixtures("half_resnet")
def test_a_folder_of_pictures(show: Show, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "pictures" / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (40, 48, 3)) + (0 if number % 2 else 120)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    output = show("picture_folder.py", "pictures", "--side", 32, "--epochs", 1, "--batch-size", 8, "--gpu-mem", "200MB")
    assert "features (2, 1, 512)" in output


def test_every_example_is_short_and_tested() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.name for file in files] == ["picture_folder.py", "sensor_stream.py", "volumes.py"]
    assert all(len(file.read_text().splitlines()) < 80 for file in files)

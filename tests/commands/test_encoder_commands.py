"""`layerwise extract` and `layerwise export`: what is printed, and exit codes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

from layerwise.commands import main
from layerwise.config import resolve
from layerwise.engines.run import RunResult, run

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """call(*arguments) gives exit code, stdout and stderr."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run_main


@pytest.fixture(scope="module")
def finished(tiny_options: dict, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("finished")
    places = {"data.source": f"fsdd:{digits}", "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
    return run(resolve(overrides={**tiny_options["speech"], **places, "training.max_epochs": 1}))


def test_extract_says_what_it_wrote_and_what_it_skipped(
    finished: RunResult, digits: Path, call: Call, tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    shutil.copytree(digits, folder)
    (folder / "broken.wav").write_bytes(b"RIFF no sound")
    code, out, err = call("extract", finished.paths.out, folder, "-o", tmp_path / "features.h5", "--stage", 2)
    assert (code, err) == (0, "")
    assert "features.h5: stage 2, 48 samples, " in out
    assert "1 files skipped:" in out
    assert "  broken.wav: cannot be decoded" in out
    with h5py.File(tmp_path / "features.h5") as file:
        assert file.attrs["stage"] == 2
        assert file["features"].dtype == np.float16
        assert len(file["ids"]) == 48


def test_extract_writes_the_labels_of_a_table(finished: RunResult, digits: Path, call: Call, tmp_path: Path) -> None:
    names = sorted(path.name for path in digits.rglob("*.wav"))
    (tmp_path / "moods.csv").write_text("file,mood\n" + "".join(f"{name},{name[0]} pm\n" for name in names[:-1]))
    arguments = ("-o", tmp_path / "features.h5", "--mean", "--labels", tmp_path / "moods.csv")
    code, _, err = call("extract", finished.paths.out, digits, *arguments)
    assert code == 0 and f"no row for 1 of 48 samples: {names[-1]}" in err
    with h5py.File(tmp_path / "features.h5") as file:
        moods = dict(zip(file["ids"].asstr()[:], file["labels/mood"].asstr()[:], strict=True))
    assert moods == {name: f"{name[0]} pm" for name in names[:-1]} | {names[-1]: ""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "{run}", "nowhere", "-o", "x.h5"], "There is no file or folder nowhere"),
        (["extract", "{run}", "images:nowhere", "-o", "x.h5"], "nowhere does not exist"),
        (["extract", "{run}", "empty", "-o", "x.h5"], "holds no recordings"),
        (["extract", "{run}", "broken.wav", "-o", "x.h5"], "1 files were skipped, the first: broken.wav"),
        (["extract", "{run}", "{data}", "-o", "x.txt"], "ends in .npy, .h5, .npz, .parquet"),
        (["extract", "{run}", "{data}", "-o", "x.npy", "--format", "npz"], "--format npz: write one of"),
        (
            ["extract", "{run}", "{data}", "-o", "x", "--format", "csv"],
            "--format csv: write one of npy, h5, npz, parquet",
        ),
        (["extract", "{run}", "{data}", "-o", "there.npy"], "exists"),
        (["extract", "{run}", "{data}", "-o", "x.h5", "--stage", "9"], "--stage 9: "),
        (["extract", "{run}", "{data}", "-o", "x.h5", "--gpu-mem", "4"], "4 has no unit"),
        (["extract", "{run}", "{data}", "-o", "x.h5", "--gpu-mem", "1kB"], "cannot hold the encoder"),
        (["extract", "{run}", "{data}", "-o", "x.h5", "--device", "cuda:7"], "--device cuda:7"),
        (["extract", "nowhere", "{data}", "-o", "x.h5"], "There is no nowhere"),
        (["export", "{run}", "-o", "empty"], "empty exists"),
        (["export", "{run}", "-o", "x", "--format", "tflite"], "there are safetensors, state-dict, pt2, onnx"),
        (["export", "empty", "-o", "x"], "not a run directory"),
    ],
)
def test_a_bad_request_is_one_sentence_and_exit_code_2(
    finished: RunResult,
    digits: Path,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("broken.wav").write_bytes(b"RIFF no sound")
    Path("there.npy").touch()
    code, out, err = call(*(argument.format(run=finished.paths.out, data=digits) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("layerwise: ")
    assert err.strip().count("\n") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.wav", "empty", "there.npy"]


def test_a_signal_ends_an_extraction_with_75_and_nothing_left(finished: RunResult, tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    samples = 0.1 * np.random.default_rng(0).standard_normal(8_000_000)
    soundfile.write(tmp_path / "long" / "long.wav", samples, 8000)
    command = [sys.executable, "-m", "layerwise", "extract", str(finished.paths.out), "long", "-o", "features.h5"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=quiet, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "features.h5.part").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 75, err
    assert "Stopped by SIGTERM" in err
    assert [path.name for path in tmp_path.iterdir()] == ["long"]


def test_export_says_how_well_it_agrees(finished: RunResult, call: Call, tmp_path: Path) -> None:
    code, out, err = call("export", finished.paths.out, "-o", tmp_path / "my encoder")
    assert (code, err) == (0, "")
    assert (
        "my encoder: safetensors, README.md says how to use it; its features are those of the encoder, bit by bit"
        in out
    )
    names = sorted(path.name for path in (tmp_path / "my encoder").iterdir())
    assert names == ["README.md", "config.toml", "encoder.safetensors"]

"""`layerwise run --out DIR` alone, and the commands that a run prints at its end: they work as they stand."""

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import layerwise
from layerwise.commands import main
from layerwise.errors import LayerwiseError
from layerwise.run_store import open_run

MINE = """
import numpy as np
from torch import nn

def network(frame_shape):
    return nn.Sequential(nn.Linear(frame_shape[0], 4), nn.ReLU(), nn.Linear(4, 4))

def other(frame_shape):
    return nn.Sequential(nn.Linear(frame_shape[0], 3), nn.ReLU(), nn.Linear(3, 3))

def data():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((30, 3)).astype(np.float32), f"kind {n % 2}") for n in range(16)]
"""
FUNCTIONS = ("--net", "mine_to_go_on_with:network", "--data", "mine_to_go_on_with:data")
SMALL = (
    "--frames",
    "steps",
    "--set",
    "data.window=12",
    "--set",
    "objective.steps=2",
    "--batch-size",
    4,
    "--max-epochs",
    1,
)

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """call(*arguments), in a folder with mine_to_go_on_with.py, gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "mine_to_go_on_with", raising=False)
    Path("mine_to_go_on_with.py").write_text(MINE)

    def run_main(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run_main


def bits(out: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(out / "encoder.safetensors").items()}


def test_the_folder_alone_says_how_a_run_goes_on(call: Call, small_run: Path) -> None:
    """Its data, its network, its budget; what was lost of it is trained again to the same bits."""
    shutil.copytree(small_run, "copied")
    shutil.rmtree("copied/stages/4")
    code, out, err = call("run", "--out", "copied")
    assert (code, err) == (0, "")
    assert "the weights of stage 4 are missing" in out
    assert bits(Path("copied")) == bits(small_run)


def test_what_is_typed_takes_the_place_of_the_runs_own_options(call: Call, small_run: Path) -> None:
    shutil.copytree(small_run, "copied")
    code, _, err = call("run", "--out", "copied", "--lr", "0.5")
    assert code == 2
    assert "--lr (training.lr) was 0.001 when stage 1 of copied was trained and is 0.5 now" in err


def test_the_commands_that_a_run_prints_work_as_they_stand(call: Call) -> None:
    code, out, err = call("run", *FUNCTIONS, *SMALL, "--out", "my run", "--time", "2h")
    assert code == 0, err
    printed = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  layerwise ")]
    assert [command[0] for command in printed] == ["probe", "report", "status", "run"]
    for command in printed:
        code, _, err = call(*command)
        assert code == 0, (command, err)
    assert printed[-1] == ["run", "--out", "my run", "--max-epochs", "2", *FUNCTIONS, "--time", "2h"]
    assert [record.epochs for record in open_run(Path("my run"))[1].stages] == [2, 2]
    code, _, err = call("run", "--out", "my run")
    assert (code, f"{FUNCTIONS[0]} {FUNCTIONS[1]}" in err) == (2, True)


def test_the_command_for_more_epochs_names_a_folder_of_caches_that_the_run_is_not_believed_about(call: Call) -> None:
    code, out, err = call("run", *FUNCTIONS, *SMALL, "--out", "runs/mine", "--cache-dir", "fast/disk")
    assert code == 0, err
    command = shlex.split(out.splitlines()[-1])[1:]
    assert command[-2:] == ["--cache-dir", "fast/disk"]
    code, _, err = call(*command[:-2])
    assert (code, f"--cache-dir {Path('fast/disk').resolve()}" in err) == (2, True)
    assert call(*command)[0] == 0
    assert [record.epochs for record in open_run(Path("runs/mine"))[1].stages] == [2, 2]


def test_overwriting_a_run_obeys_none_of_the_options_of_the_one_that_is_deleted(call: Call) -> None:
    assert call("run", *FUNCTIONS, *SMALL, "--out", "mine", "--seed", 7)[0] == 0
    other = ("--net", "mine_to_go_on_with:other", *FUNCTIONS[2:])
    code, _, err = call("run", *other, *SMALL, "--out", "mine", "--overwrite")
    assert (code, err) == (0, "")
    config = open_run(Path("mine"))[1].config
    assert (config.net.name, config.training.seed) == (other[1], 0)
    with pytest.raises(LayerwiseError, match="names a function"):
        layerwise.run(out="mine", device="cuda:99")
    with pytest.raises(LayerwiseError, match="cuda:99"):
        layerwise.run(out="mine", device="cuda:99", overwrite=True)


def test_a_folder_that_is_mistyped_is_pointed_out(call: Call) -> None:
    code, _, err = call("run", "--out", "runs/nowhere", "--dry-run")  # which is refused, so that nothing is trained
    assert code == 2
    assert "there is no run in runs/nowhere to go on with: the demo begins there" in err

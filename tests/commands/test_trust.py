"""Nothing foreign is run: what a file names to be called, and modules that lie in the present folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import layerwise
from layerwise.commands import main
from layerwise.config import resolve, with_options
from layerwise.config.options import EngineOptions
from layerwise.errors import ConfigError
from layerwise.importing import named_function, python_module
from layerwise.run_store import RunStore, open_run, own_options

FOREIGN = """
import pathlib
import numpy as np
from torch import nn

pathlib.Path("ran").touch()

def network(frame_shape):
    return nn.Sequential(nn.Linear(frame_shape[0], 4), nn.ReLU())

def data():
    return np.random.default_rng(0).standard_normal((12, 30, 3)).astype(np.float32)
"""
RECEIVED = """
[data]
source = "foreign:data"
frames = "steps"
window = 12
[net]
name = "foreign:network"
[objective]
steps = 2
[training]
batch_size = 4
"""
NET, DATA = ("--net", "foreign:network"), ("--data", "foreign:data")

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """call(*arguments), in a folder with what was received, gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    Path("foreign.py").write_text(FOREIGN)
    Path("received.toml").write_text(RECEIVED)

    def run_main(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run_main


@pytest.mark.parametrize(("named", "missing"), [((), NET), (NET, DATA), (DATA, NET)])
@pytest.mark.parametrize("command", ["run", "plan", "init", "compare"])
def test_a_function_that_a_config_names_is_not_called_and_the_way_to_call_it_is_said(
    call: Call, command: str, named: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    code, out, said = call(command, "--config", "received.toml", *named)
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert f"received.toml names a function that would be called, {missing[1]}" in said
    assert f"too: {' '.join(missing)}, or " in said
    assert not Path("ran").exists()
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["run", "plan", "init", "compare"])
def test_a_folder_of_hugging_face_that_a_config_names_is_not_opened_and_the_way_to_open_it_is_said(
    call: Call, command: str
) -> None:
    Path("received.toml").write_text('[data]\nsource = "npy:x.npy"\n[net]\nname = "hf:theirs"\n')
    code, out, said = call(command, "--config", "received.toml")
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert "received.toml names a network that would be read, hf:theirs; " in said
    assert "too: --net hf:theirs, or network='hf:theirs' in Python" in said
    assert "received.toml names" not in call(command, "--config", "received.toml", "--net", "hf:theirs")[2]


def test_a_function_that_the_command_names_too_is_called_and_the_next_commands_name_it(call: Call) -> None:
    code, out, _ = call("init", "--config", "received.toml", *NET, *DATA, "-o", "mine.toml")
    assert code == 0
    assert f"  layerwise plan --config mine.toml {' '.join((*NET, *DATA))}\n" in out
    assert call("plan", "--config", "mine.toml", *NET, *DATA)[0] == 0


def test_a_scheduler_that_a_config_names_is_not_joined(call: Call) -> None:
    Path("received.toml").write_text('[engine]\nname = "dask"\nscheduler = "tcp://127.0.0.1:1"\n')
    code, _, said = call("run", "--config", "received.toml")
    assert code == 2
    assert "the scheduler tcp://127.0.0.1:1" in said


@pytest.mark.parametrize("change", [{"net.name": NET[1]}, {"data.source": DATA[1]}, {"data.source": "foreign"}])
def test_a_function_that_a_run_folder_names_is_not_called(call: Call, small_run: Path, change: dict[str, str]) -> None:
    """`foreign`, without a function, would be imported, too."""
    shutil.copytree(small_run, "theirs")
    store, state = open_run(Path("theirs"))
    state.config = with_options(state.config, change)
    store.save_state(state)
    refused = f"theirs/run.json names a function that would be called, {next(iter(change.values()))};"
    probe, task = ("probe", "theirs", "--label", "digit"), ("task", "theirs", "--round", 1, "--stage", 1)
    for command in (probe, task, ("run", "--out", "theirs"), ("run", "--out", "theirs", "--max-epochs", 9)):
        code, out, said = call(*command)
        assert (code, out, refused in said) == (2, "", True), said
    with pytest.raises(ConfigError, match="names a function"):
        layerwise.probe("theirs", "digit")
    assert not Path("ran").exists()


def test_where_a_run_folder_would_write_and_who_would_work_for_it_is_not_taken_from_it(
    call: Call, small_run: Path
) -> None:
    shutil.copytree(small_run, "theirs")
    store, state = open_run(Path("theirs"))
    theirs = {"cache.scratch": "scratch", "cache.dir": "elsewhere", "training.log": "mlflow", "out": "other"}
    theirs |= {"engine.name": "dask", "engine.scheduler": "tcp://127.0.0.1:1", "training.warm_start": "old"}
    state.config = with_options(state.config, theirs)
    store.save_state(state)
    taken = own_options({"out": "theirs"})
    assert taken is not None
    places = (taken.out, taken.cache.dir, taken.cache.scratch, taken.training.log, taken.training.warm_start)
    assert places == ("theirs", "cache", None, "none", None)
    assert taken.engine == EngineOptions()
    assert (taken.data, taken.net, taken.memory) == (state.config.data, state.config.net, state.config.memory)


def test_where_caches_are_written_is_not_taken_from_a_run_folder_alone(small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "project" / "runs" / "theirs"
    shutil.copytree(small_run, out)
    store, state = open_run(out)
    state.config = with_options(state.config, {"cache.dir": "elsewhere"})

    def taken(folder: Path, **given: object) -> str | None:
        """Where caches would be written, had they lain in this folder."""
        caches = RunStore(out, folder / "theirs")
        caches.caches.mkdir(parents=True)
        caches.write_caches_owner(state.run_id)
        state.caches = os.path.relpath(caches.caches, out)
        store.save_state(state)
        own = own_options({"out": str(out), **given})
        return own and own.cache.dir

    for own in (out / "caches", tmp_path / "project" / "cache", tmp_path / "project" / "runs" / "cache"):
        assert taken(own) == str(own)
    elsewhere = tmp_path / "home" / "precious"
    with pytest.raises(ConfigError, match=f"say so in the command: --cache-dir {elsewhere}"):
        taken(elsewhere)
    given = str(tmp_path / "given")
    assert taken(tmp_path / "home" / "cache", **{"cache.dir": given}) == given


def test_another_network_than_that_of_the_run_is_not_called_either(call: Call, small_run: Path) -> None:
    code, _, said = call("probe", small_run, "--label", "digit", *NET)
    assert (code, "was trained with speech; name that one." in said) == (2, True)
    assert not Path("ran").exists()


def test_python_names_functions_as_strings(call: Call) -> None:
    with pytest.raises(ConfigError, match="network='foreign:network' in Python"):
        resolve(config_file=Path("received.toml"), overrides={"data.source": DATA[1]})
    with pytest.raises(ConfigError, match="data='foreign:data' in Python"):
        layerwise.plan(NET[1], config="received.toml")
    assert not Path("ran").exists()
    assert layerwise.plan(NET[1], DATA[1], config="received.toml").stages


@pytest.mark.parametrize("start", [[sys.executable, "-m", "layerwise"], python_module("layerwise")])
def test_a_file_of_the_present_folder_is_not_taken_for_a_module_of_pythons(tmp_path: Path, start: list[str]) -> None:
    for name in ("json", "random", "click", "logging", "subprocess"):
        (tmp_path / f"{name}.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    done = subprocess.run([*start, "recipes"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "ran").exists()


def test_a_function_of_the_present_folder_is_found_behind_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in ("colorsys", "mynets_of_this_test"):
        Path(f"{name}.py").write_text("def make():\n    return 7\n")
    assert named_function("mynets_of_this_test:make", "--net", [])() == 7
    with pytest.raises(ConfigError, match=r"colorsys has no function make; it was found at .*/colorsys.py") as refused:
        named_function("colorsys:make", "--net", [])
    assert str(tmp_path) not in str(refused.value)

"""`layerwise init` and `layerwise recipes`: a file to edit that means what the recipe meant."""

import itertools
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise import config as configuration
from layerwise.commands import main
from layerwise.errors import ConfigError

Call = Callable[..., tuple[int, str, str]]

CHANGES = {
    "memory.gpu_mem": st.sampled_from(["4GB", "3.5GiB", 123_456_789]),
    "cache.disk": st.sampled_from(["200GB", None]),
    "cache.scratch": st.text("ab/ '\"#\\ü$", min_size=1),
    "data.pattern": st.sampled_from(["", r"(?P<speaker>[a-z]+)_\d", "'\"#"]),
    "data.gray": st.booleans(),
    "net.blocks": st.sampled_from([[3, 4, 6], [1, 1]]),
    "net.name": st.sampled_from(["speech", "vision"]),
    "objective.label": st.sampled_from(["", "speaker"]),
    "training.stages": st.integers(1, 6),
    "training.lr": st.floats(1e-9, 10),
    "engine.devices": st.sampled_from(["0,1", "cpu,cpu"]),
    "engine.sbatch": st.sampled_from([["--account=physics", "-C big"], []]),
    "engine.name": st.sampled_from(["local", "slurm", "dask"]),
    "engine.time": st.sampled_from(["2h", "1:30:00"]),
    "out": st.sampled_from(["runs/mine", "a b"]),
}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """call(*arguments), in an empty folder, gives exit code, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run_main(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run_main


@pytest.mark.parametrize(
    ("recipe", "kind"), list(itertools.product(configuration.recipe_names(), configuration.DATA_KINDS))
)
def test_the_file_of_every_recipe_is_read_back_as_it_was(recipe: str, kind: str, tmp_path: Path) -> None:
    source = kind if kind == "demo" else f"{kind}:some where"
    written = configuration.resolve(recipe, overrides={"data.source": source})
    (tmp_path / "config.toml").write_text(configuration.commented(written))
    assert configuration.resolve(config_file=tmp_path / "config.toml") == written


@given(
    st.sampled_from(configuration.recipe_names()),
    st.sampled_from(configuration.DATA_KINDS),
    st.fixed_dictionaries({}, optional=CHANGES),
)
def test_the_file_of_any_options_is_read_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, recipe: str, kind: str, changes: dict
) -> None:
    written = configuration.resolve(recipe, overrides={"data.source": f"{kind}:x", **changes})
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(configuration.commented(written))
    assert configuration.resolve(config_file=path) == written


@pytest.mark.parametrize("recipe", configuration.recipe_names())
def test_every_option_stands_in_the_file_with_its_help(recipe: str) -> None:
    text = configuration.commented(configuration.resolve(recipe))
    for option in configuration.options():
        assert f"# {option.help}" in text
        assert f"{option.key.split('.')[-1]} =" in text


def test_options_of_the_other_network_stand_in_comments() -> None:
    speech = tomllib.loads(configuration.commented(configuration.resolve("fsdd", overrides={"data.source": "fsdd:x"})))
    assert {"sample_rate", "window"} <= speech["data"].keys()
    assert not {"picture", "crop", "gray"} & speech["data"].keys()
    assert "blocks" not in speech["net"]
    pictures = tomllib.loads(configuration.commented(configuration.resolve(overrides={"data.source": "images:x"})))
    assert {"picture", "crop", "gray"} <= pictures["data"].keys()
    assert "sample_rate" not in pictures["data"]
    assert "kernels" not in pictures["net"]


def test_init_says_what_it_saw_and_overwrites_nothing(call: Call, digits: Path) -> None:
    code, out, err = call("init", "--data", f"fsdd:{digits}", "--gpu-mem", "4GB")
    assert (code, err) == (0, "")
    assert f"config.toml: for 48 samples from fsdd:{digits}\n" in out
    assert "labels for probes: digit, speaker" in out
    assert "layerwise run --config config.toml" in out
    written = Path("config.toml").read_text()
    assert 'gpu_mem = "4GB"' in written
    code, _, err = call("init", "--data", f"fsdd:{digits}")
    assert (code, "config.toml exists" in err) == (2, True)
    assert Path("config.toml").read_text() == written
    meant = configuration.resolve(overrides={"data.source": f"fsdd:{digits}", "memory.gpu_mem": "4GB"})
    assert configuration.resolve(config_file=Path("config.toml")) == meant


def test_recipes_are_listed_with_their_first_line_and_printed_whole(call: Call) -> None:
    code, out, _ = call("recipes")
    assert code == 0
    for name in configuration.recipe_names():
        assert f"{name} " in out
        text = configuration.recipe_text(name)
        assert text.startswith("# ")
        assert text.splitlines()[0].removeprefix("# ") in out
        assert call("recipes", name)[:2] == (0, text)
    with pytest.raises(ConfigError, match="There is no recipe"):
        configuration.recipe_text("../config")

"""Options: recipes below files below flags, and errors that say what would be right."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import ByteSize

from layerwise import config
from layerwise.errors import ConfigError


def test_later_sources_win(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[training]\nlr = 0.5\nbatch_size = 3\n")
    resolved = config.resolve("fsdd", tmp_path / "mine.toml", {"training.lr": 0.25})
    assert (resolved.training.lr, resolved.training.batch_size) == (0.25, 3)
    assert resolved.data.sample_rate == 8000


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("demo", "runs/demo"),
        ("fsdd:x", "runs/fsdd"),
        ("speech:x", "runs/librispeech"),
        ("images:x", "runs/stl10"),
        ("cifar10:x", "runs/cifar10"),
    ],
)
def test_the_recipe_follows_the_data(source: str, out: str) -> None:
    assert config.resolve(overrides={"data.source": source}).out == out


def test_pictures_of_cifar10_in_patches_have_a_recipe_of_their_own() -> None:
    for option in ({"data.frames": "patches"}, {"net.name": "vision"}):
        assert config.resolve(overrides={"data.source": "cifar10:x", **option}).out == "runs/cifar10-patches"


def test_every_recipe_is_valid() -> None:
    assert config.recipe_names() == [
        "cifar10",
        "cifar10-patches",
        "demo",
        "fsdd",
        "librispeech",
        "steps",
        "stl10",
        "whole",
    ]
    for name in config.recipe_names():
        config.resolve(name)


def test_the_librispeech_recipe_is_the_papers() -> None:
    paper = config.resolve("librispeech")
    assert (paper.net.width, paper.net.context, paper.net.kernels) == (512, 256, (10, 8, 4, 4, 4))
    assert (paper.objective.steps, paper.objective.negatives, paper.objective.anchors) == (12, 10, 128)
    assert (paper.data.window, paper.data.sample_rate) == (20480, 16000)
    assert (paper.training.lr, paper.training.batch_size) == (2e-4, 8)


def test_a_resolved_configuration_round_trips_through_toml(tmp_path: Path) -> None:
    resolved = config.resolve("cifar10", overrides={"memory.gpu_mem": "3.5GiB", "training.stages": 2})
    (tmp_path / "config.toml").write_text(resolved.to_toml())
    assert config.load(tmp_path / "config.toml") == resolved


def test_places_may_be_paths() -> None:
    for cache in ({"cache.dir": Path("caches")}, {"cache": {"dir": Path("caches")}}):
        resolved = config.resolve(overrides={"out": Path("runs/mine"), **cache})
        assert (resolved.out, resolved.cache.dir) == ("runs/mine", "caches")


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("4GiB", 4 * 2**30), ("3.5 GB", 35 * 10**8), ("800mb", 8 * 10**8)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert config.resolve(overrides={"memory.gpu_mem": text}).memory.gpu_mem == ByteSize(size)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1", ("a.b", 1)),
        ("a.b=[1, 2]", ("a.b", [1, 2])),
        ("a.b=true", ("a.b", True)),
        ("a.b=runs/x", ("a.b", "runs/x")),
        ("a.b=x=y", ("a.b", "x=y")),
    ],
)
def test_assignments_are_toml_or_plain_text(text: str, expected: tuple[str, object]) -> None:
    assert config.parse_assignment(text) == expected


@pytest.mark.parametrize(("given", "stages"), [(6, 6), ("6", 6), (1, 1), ("fewest", "fewest"), (None, None)])
def test_stages_are_a_number_or_the_fewest_and_are_read_again(tmp_path: Path, given: object, stages: object) -> None:
    resolved = config.resolve(overrides={"training.stages": given})
    assert resolved.training.stages == stages
    (tmp_path / "config.toml").write_text(resolved.to_toml())
    assert config.load(tmp_path / "config.toml") == resolved


@pytest.mark.parametrize("given", [0, -1, 10_001, 1.5, "six", "Fewest", ""])
def test_other_stages_are_refused_with_what_there_is(given: object) -> None:
    sentence = f"--stages: must be a whole number from 1 to 10000, or fewest, got {given!r}."
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        config.resolve(overrides={"training.stages": given})


def test_a_misspelt_option_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"'objective.negative'; did you mean objective.negatives"):
        config.resolve(overrides={"objective.negative": 3})


def test_broken_toml_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[training\n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        config.resolve(config_file=tmp_path / "broken.toml")


def test_every_option_has_help_and_a_scope() -> None:
    listed = list(config.options())
    assert all(option.help and option.scope in ("shape", "training", "place") for option in listed)
    flat = {f"{s}.{k}" for s, v in tomllib.loads(config.resolve().to_toml()).items() if isinstance(v, dict) for k in v}
    assert flat <= {option.key for option in listed}


def test_changes_are_listed_by_scope() -> None:
    old = config.resolve()
    new = config.resolve(overrides={"training.lr": 0.5, "net.width": 3, "memory.gpu_mem": "1GB"})
    assert [option.key for option, _, _ in config.changed_options(old, new, {"training"})] == ["training.lr"]
    assert [option.key for option, _, _ in config.changed_options(old, new, {"shape"})] == ["net.width"]


@pytest.mark.parametrize(
    ("request_", "meant"),
    [
        ({"overrides": {"gpu-mem": "4GB"}}, r"There is no option 'gpu-mem'; did you mean memory\.gpu_mem\?"),
        ({"overrides": {"training.epochs": 3}}, r"did you mean training\.max_epochs\?"),
        ({"overrides": {"zzz": 3}}, r"There is no option 'zzz'; `layerwise init` writes a file with all there are\."),
        ({"recipe": "Librispech"}, r"whole\. Did you mean librispeech\?"),
        ({"overrides": {"data.source": "painting:/x"}}, r"package\.module:function\.$"),
        ({"overrides": {"data.source": "image:/x"}}, r"Did you mean images\?"),
        ({"overrides": {"cache.keep": "needet"}}, r"got 'needet'\. Did you mean needed\?"),
    ],
)
def test_what_looks_like_a_real_name_is_asked_for(request_: dict, meant: str) -> None:
    with pytest.raises(ConfigError, match=meant):
        config.resolve(**request_)


def test_what_is_wrong_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[training]\nlrr = 1")
    with pytest.raises(ConfigError, match=r"In .*mine\.toml: There is no option 'training\.lrr'"):
        config.resolve(config_file=file)
    file.write_text("[training]\nlr = 1.0")
    with pytest.raises(ConfigError, match=r"^--max-epochs: "):
        config.resolve(config_file=file, overrides={"training.max_epochs": 0})

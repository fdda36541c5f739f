"""Resolves one Config from a recipe, TOML files and single options; later ones win. A wrong option becomes one sentence."""

import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from layerwise.config.functions import FUNCTIONS, SAID_ANEW, named_here, refuse_scheduler
from layerwise.config.options import DATA_KINDS, FUNCTION, OWN, PICTURES, PRESET_NETWORKS, RECORDINGS, Config, options
from layerwise.errors import ConfigError, UnreadableFile, did_you_mean, near
from layerwise.files import read_bytes

TOML_BYTES = 2**20
"""Most that a file of options may have."""

RECIPE_OF_KIND = {"speech": "librispeech", "images": "stl10"}
"""The recipe that a kind of data is trained with when none is named; of other kinds the one of their own name, or else the one
of their frames."""


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("layerwise.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """The TOML of a recipe; its first line says what it is for. Raises ConfigError."""
    names = recipe_names()
    if name not in names:
        raise ConfigError(
            f"There is no recipe {name!r}; the recipes are {', '.join(names)}.{did_you_mean(name, names)}"
        )
    return (resources.files("layerwise.recipes") / f"{name}.toml").read_text(encoding="utf-8")


def resolve(
    recipe: str | None = None,
    config_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    default_out: str = "runs/{recipe}",
) -> Config:
    """One Config from a recipe, then a TOML file, then single options; later ones win.

    `overrides` maps dotted keys to values; default_out: `out` where nothing says it. Raises ConfigError with the option, the
    value and what would be right; and where the file names a function that `overrides` do not.
    """
    flags = _nested(overrides or {})
    given = _merge(_read_toml(config_file) if config_file else {}, flags)
    kind, frames = data_kind(str(_in(given, "data", "source") or "demo")), _frames(given)
    recipe = recipe or _recipe_for(kind, frames)
    defaults = tomllib.loads(recipe_text(recipe))
    frames = frames or _frames(_merge(defaults, given)) or "steps"
    follows = {"data": {"frames": frames}} | ({"objective": {"name": "ntxent"}} if frames == "whole" else {})
    defaults = _merge(follows, defaults)
    tree = _merge(defaults, given)
    if not tree.get("out"):
        tree["out"] = default_out.format(recipe=recipe)
    try:
        config = validated(tree)
    except ConfigError as error:
        if config_file is None or not _is_valid(_merge(defaults, flags)):
            raise
        raise ConfigError(f"In {config_file}: {error}") from None
    if config_file is not None:
        here = {"net.name": _in(flags, "net", "name"), "data.source": _in(flags, "data", "source")}
        config = named_here(config, here, config_file)
        if _in(flags, "engine", "scheduler") is None:
            refuse_scheduler(config, config_file)
    return config


def resolve_again(own: Config, path: Path, given: Mapping[str, Any]) -> Config:
    """The options of a run, which path, its run.json, holds, with those that are given now in place of its own.

    given: values by dotted keys. Where things are written, who performs the tasks and who is shown the curves is never taken
    from the file, which may be somebody else's: see `SAID_ANEW`. Raises ConfigError as `resolve`.
    """
    tree = named_here(own, {key: given.get(key) for key in FUNCTIONS}, path).model_dump(mode="json", exclude_none=True)
    for key in SAID_ANEW:
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree).pop(name, None)
    return validated(_merge(tree, _nested(given)))


def data_kind(source: str) -> str:
    """What stands before the colon of --data where it is one of DATA_KINDS, and else OWN. Raises ConfigError."""
    kind = source.partition(":")[0]
    if kind in DATA_KINDS:
        return kind
    if source == OWN or re.fullmatch(FUNCTION, source):
        return OWN
    raise ConfigError(
        f"--data {source}: write demo, or one of {', '.join(f'{k}:PATH' for k in DATA_KINDS if k != 'demo')}, or "
        f"package.module:function.{did_you_mean(kind, DATA_KINDS)}"
    )


def _frames(tree: Mapping[str, Any]) -> str | None:
    """What a frame is, where it is given; else what the network reads, where that is given."""
    net, source = _in(tree, "net", "name"), str(_in(tree, "data", "source") or "demo")
    if given := _in(tree, "data", "frames"):
        return str(given)
    if net in PRESET_NETWORKS:
        return {"speech": "steps", "vision": "patches", "convnet": "whole"}[net]
    return net and ("steps" if data_kind(source) in RECORDINGS else "whole")


def _recipe_for(kind: str, frames: str | None) -> str:
    if frames == "whole":
        return "whole"
    if kind == "cifar10" and frames:
        return "cifar10-patches"
    if kind in RECORDINGS or kind in PICTURES:
        return RECIPE_OF_KIND.get(kind, kind)
    return "steps"


def _in(tree: Mapping[str, Any], section: str, name: str) -> Any:
    options = tree.get(section)
    return options.get(name) if isinstance(options, Mapping) else None


def load(path: Path) -> Config:
    """The Config in a resolved TOML file. Raises ConfigError."""
    tree = _read_toml(path)
    try:
        return validated(tree)
    except ConfigError as error:
        raise ConfigError(f"In {path}, which another version of layerwise may have written: {error}") from None


def parsed(text: str) -> Config:
    """The Config in resolved TOML. Raises ConfigError, or ValueError where it is no TOML."""
    return validated(_toml(text))


def with_options(config: Config, changes: Mapping[str, Any]) -> Config:
    """The Config with these options in place of its own; `changes` maps dotted keys to values. Raises ConfigError."""
    return validated(_merge(config.model_dump(mode="json", exclude_none=True), _nested(changes)))


def without_places(config: Config) -> Config:
    """All options of the scope "place" at their defaults; of the data, their kind alone. Raises ConfigError."""
    return parsed(result_toml(config))


def result_toml(config: Config) -> str:
    """The options of the other scopes, and the kind of the data, as TOML that `parsed` reads. Raises ConfigError."""
    everything = config.model_dump(mode="json", exclude_none=True)
    kept: dict[str, dict[str, object]] = {"data": {"source": data_kind(config.data.source)}}
    for option in options():
        section, _, name = option.key.rpartition(".")
        if option.scope != "place" and name in everything[section]:
            kept.setdefault(section, {})[name] = everything[section][name]
    return tomli_w.dumps(kept)


def validated(tree: Mapping[str, Any]) -> Config:
    """A Config from nested dicts. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(sentence(error)) from None


def _is_valid(tree: Mapping[str, Any]) -> bool:
    try:
        validated(tree)
    except ConfigError:
        return False
    return True


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` of `--set`; the value is read as TOML, and as plain text where it is not TOML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: write it as key=value, for example --set objective.negatives=16.")
    try:
        parsed = _toml(f"value = {value}")["value"]
    except ValueError:
        parsed = value
    return key.strip(), parsed


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return _toml(read_bytes(path, TOML_BYTES).decode())
    except FileNotFoundError as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except UnreadableFile as error:
        raise ConfigError(f"The configuration {error}") from None
    except ValueError as error:
        raise ConfigError(f"The configuration {path} is not valid TOML: {error}.") from None


def _toml(text: str) -> dict[str, Any]:
    """Raises ValueError where it is no TOML, too long, or nested more deeply than Python reads it."""
    if len(text) > TOML_BYTES:
        raise ValueError(f"it is longer than {TOML_BYTES:,} characters")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested dicts."""
    tree: dict[str, Any] = {}
    for key, value in options.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    return tree


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


_PLAIN_WORDS = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
}


_PATTERNS = {
    "training.device": "must be auto, cpu, cuda or cuda:N",
    "net.name": "must be speech, vision, convnet, torchvision:NAME, timm:NAME, hf:PATH or package.module:function",
}

_UNIONS = {"training.stages": "must be a whole number from 1 to 10000, or fewest"}


def sentence(error: ValidationError) -> str:
    """The first thing that is wrong, with the option, the value and what would be right."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    union = next((union for union in _UNIONS if key.startswith(f"{union}.")), None)
    key = union or key  # without which of its kinds was tried
    if first["type"] == "extra_forbidden":
        return f"There is no option {key!r}{_instead(key)}"
    flag = next((option.flag for option in options() if option.key == key), None)
    plain = _PATTERNS.get(key) if first["type"] == "string_pattern_mismatch" else _PLAIN_WORDS.get(first["type"])
    message = _UNIONS.get(key) or plain or first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    meant = re.findall("'(.+?)'", first["ctx"]["expected"]) if first["type"] == "literal_error" else []
    return f"{flag or key}: {message[0].lower() + message[1:]}{shown}.{did_you_mean(str(first['input']), meant)}"


def _instead(key: str) -> str:
    """Options with a like name: behind their section, or else whole."""
    known = [option.key for option in options()]
    endings = near(key.split(".")[-1].replace("-", "_"), {name.split(".")[-1] for name in known})
    meant = [name for name in known if name.split(".")[-1] in endings[:1]] or near(key, known)
    return f"; did you mean {' or '.join(meant)}?" if meant else "; `layerwise init` writes a file with all there are."

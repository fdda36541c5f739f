"""Code that a file names is run only where the command that reads the file names it, too, and a network of hf:PATH is made.

Whoever wrote the file may have chosen it. Nobody who looks at a folder or a configuration of somebody else's is to run code of
theirs by that, nor to open a folder that they have not named.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.config.options import (
    DATA_KINDS,
    HUGGING_FACE,
    OWN,
    PRESET_NETWORKS,
    TIMM,
    TORCHVISION,
    Config,
    options,
    value_of,
)
from layerwise.errors import ConfigError

FUNCTIONS = {"net.name": "--net", "data.source": "--data"}
"""Options that may name a function of the user's, or a network of hf:PATH, and their flags."""

_KEYWORDS = {"net.name": "network", "data.source": "data", "engine.scheduler": "scheduler"}


_PERFORMED = (
    *("cache.scratch", "training.log"),
    *(option.key for option in options() if option.key.startswith("engine.")),
)
"""Options on who performs the tasks of a run, and whom the curves are shown."""

SAID_ANEW = ("out", "cache.dir", "training.warm_start", *_PERFORMED)
"""Options that a command does not take from the file of a run that it goes on with."""


def named_functions(config: Config) -> dict[str, str]:
    """The functions that the options name, package.module:function, and the network of hf:PATH, by dotted keys."""
    net, source = config.net.name, config.data.source
    named = {}
    if net not in (*PRESET_NETWORKS, OWN) and not net.startswith((TORCHVISION, TIMM)):
        named["net.name"] = net
    if source != OWN and source.partition(":")[0] not in DATA_KINDS:
        named["data.source"] = source
    return named


def function_flags(config: Config) -> list[str]:
    """What a command that goes on with a run of these options must say: --net and --data where they name one of these."""
    return [word for key, function in named_functions(config).items() for word in (FUNCTIONS[key], function)]


def flags_elsewhere(config: Config) -> list[str]:
    """What a command that goes on with a run of these options must say besides, so that it does so in the same way."""
    words = []
    for option in options():
        value = value_of(config, option.key)
        if option.key not in (*_PERFORMED, "cache.dir") or value == option.default:
            continue
        if option.flag:
            words += [option.flag, ",".join(value) if isinstance(value, tuple) else str(value)]
        else:
            words += ["--set", f"{option.key}={list(value) if isinstance(value, tuple) else value}"]
    return words


def refuse_function(config: Config, key: str, path: Path) -> None:
    """For an option that the command does not give itself: raises ConfigError where path, a file, names a function by it, or
    a network of hf:PATH."""
    if function := named_functions(config).get(key):
        what = (
            "a network that would be read" if function.startswith(HUGGING_FACE) else "a function that would be called"
        )
        _refuse(f"{what}, {function}", FUNCTIONS[key], key, function, path)


def refuse_scheduler(config: Config, path: Path) -> None:
    """For a command that names no scheduler: raises ConfigError where path, a file, does. One may have code run here."""
    if address := config.engine.scheduler:
        _refuse(
            f"the scheduler {address}, which may have code run here", "--scheduler", "engine.scheduler", address, path
        )


def named_here(config: Config, given: Mapping[str, Any], path: Path) -> Config:
    """The options that path, a file, holds; the data are where the command says, if it says so.

    given: what the command gives for "net.name" and "data.source": text, an object, or None. Raises ConfigError where the
    file names a function or hf:PATH that the command does not, or the command names another network.
    """
    for key in FUNCTIONS:
        if given.get(key) is None:
            refuse_function(config, key, path)
    network, source = given.get("net.name"), given.get("data.source")
    if isinstance(network, str):
        refuse_other_network(config, network, path)
    if not isinstance(source, str):
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"source": source})})


def refuse_other_network(config: Config, network: str, path: Path) -> None:
    """Raises ConfigError where --net names another network than path, a file."""
    if network != config.net.name:
        raise ConfigError(f"--net {network}: {path} was trained with {config.net.name}; name that one.")


def _refuse(what: str, flag: str, key: str, value: str, path: Path) -> None:
    raise ConfigError(
        f"{path} names {what}; if you trust whoever wrote the file, name it in the command, too: {flag} {value}, or "
        f"{_KEYWORDS[key]}={value!r} in Python."
    )

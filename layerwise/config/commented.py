"""A configuration as a file to edit: every option with its help and its value."""

from collections.abc import Iterator
from typing import Any

import tomli_w
from pydantic import ByteSize

from layerwise.config.options import NONE, PICTURES, Config, Option, options, value_of
from layerwise.config.resolving import data_kind, resolve

_KINDS = {"speech", "steps", "images", "vision", "convnet", "supervised", "ntxent", "infonce+ntxent", "dask", "slurm"}
"""Words before the colon of a help text that name what the option is for; it is read by no others."""

_UNITS = {"TB": 10**12, "TiB": 2**40, "GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "kB": 10**3, "KiB": 2**10}


def commented(config: Config) -> str:
    """TOML that `resolve(config_file=...)` reads back as the same Config.

    Options without a value stand in comments, and so do those of other networks, engines and objectives where reading the
    file gives them the same value anyway.
    """
    chosen = {"data.source": config.data.source, "data.frames": config.data.frames}
    otherwise = resolve(overrides=chosen)
    lines = [
        "# Options of a run: layerwise run --config FILE. What is commented out keeps the value that stands there."
    ]
    section = ""
    for option in options():
        if "." in option.key and option.key.partition(".")[0] != section:
            section = option.key.partition(".")[0]
            lines += ["", f"[{section}]"]
        lines += _lines(option, config, otherwise)
    return "\n".join(lines) + "\n"


def _lines(option: Option, config: Config, otherwise: Config) -> Iterator[str]:
    value, name = value_of(config, option.key), option.key.rpartition(".")[2]
    yield f"# {option.help}{f' ({option.flag})' if option.flag else ''}"
    if value is None:
        yield f"# {name} =" if value_of(otherwise, option.key) is None else f'{name} = "{NONE}"'
    else:
        as_without = not _concerns(option, config) and value == value_of(otherwise, option.key)
        yield f"{'# ' if as_without else ''}{name} = {_toml(value)}"


def _concerns(option: Option, config: Config) -> bool:
    kinds = set(option.help.partition(":")[0].split(", "))
    pictures = {"images"} if data_kind(config.data.source) in PICTURES or config.data.frames == "patches" else set()
    asked = {config.net.name, config.data.frames, config.objective.name, config.engine.name}
    return not kinds <= _KINDS or bool(kinds & (asked | pictures))


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"_": _sized(value) if isinstance(value, ByteSize) else value}).removeprefix("_ = ").strip()


def _sized(value: int) -> str | int:
    """Bytes in the largest unit of which they are a whole number."""
    return next((f"{value // size}{unit}" for unit, size in _UNITS.items() if value % size == 0), int(value))

"""The options that a result keeps: those that shaped it, and neither where things lay nor how they were run."""

import tomllib

import tomli_w

from layerwise.config.listing import options
from layerwise.config.options import Config
from layerwise.config.resolving import data_kind, validated


def without_places(config: Config) -> Config:
    """All options of the scope "place" at their defaults; of the data, their kind alone. Raises ConfigError."""
    return validated(tomllib.loads(result_toml(config)))


def result_toml(config: Config) -> str:
    """The options of the other scopes, and the kind of the data, as TOML that `parsed` reads. Raises ConfigError."""
    everything = config.model_dump(mode="json", exclude_none=True)
    kept: dict[str, dict[str, object]] = {"data": {"source": data_kind(config.data.source)}}
    for option in options():
        section, _, name = option.key.rpartition(".")
        if option.scope != "place" and name in everything[section]:
            kept.setdefault(section, {})[name] = everything[section][name]
    return tomli_w.dumps(kept)

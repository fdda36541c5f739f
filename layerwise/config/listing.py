"""The options as the command line, the documentation and a resume see them."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from layerwise.config.options import Config, Scope, Section


@dataclass(frozen=True, slots=True)
class Option:
    """One option as the command line and the documentation see it."""

    key: str
    """Dotted name, for example training.lr."""
    flag: str | None
    """Its own command line flag, or None where only `--set key=value` reaches it."""
    scope: Scope
    help: str
    default: Any


def options() -> Iterator[Option]:
    """Every option, in the order of the file."""
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for inner, inner_field in field.annotation.model_fields.items():
                yield _as_option(f"{name}.{inner}", inner_field)
        else:
            yield _as_option(name, field)


def _as_option(key: str, field: Any) -> Option:
    extra = field.json_schema_extra
    return Option(key, extra["flag"], extra["scope"], (field.description or "").replace("\n", " "), field.default)


def changed_options(old: Config, new: Config, scopes: set[Scope]) -> list[tuple[Option, Any, Any]]:
    """Options of the given scopes whose values differ: (option, old value, new value)."""
    return [
        (option, value_of(old, option.key), value_of(new, option.key))
        for option in options()
        if option.scope in scopes and value_of(old, option.key) != value_of(new, option.key)
    ]


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return attrgetter(key)(config)

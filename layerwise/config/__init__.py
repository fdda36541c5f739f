"""The options of a run: what there are, and one Config from all the places where they are given."""

from layerwise.config.commented import commented
from layerwise.config.listing import Option, changed_options, options, value_of
from layerwise.config.options import (
    CacheOptions,
    Config,
    DataOptions,
    EngineOptions,
    MemoryOptions,
    NetOptions,
    ObjectiveOptions,
    Scope,
    TrainingOptions,
)
from layerwise.config.resolving import (
    DATA_KINDS,
    RECIPE_OF_KIND,
    load,
    parse_assignment,
    parsed,
    recipe_names,
    recipe_text,
    resolve,
    validated,
    with_options,
)

__all__ = [
    "DATA_KINDS",
    "RECIPE_OF_KIND",
    "CacheOptions",
    "Config",
    "DataOptions",
    "EngineOptions",
    "MemoryOptions",
    "NetOptions",
    "ObjectiveOptions",
    "Option",
    "Scope",
    "TrainingOptions",
    "changed_options",
    "commented",
    "load",
    "options",
    "parse_assignment",
    "parsed",
    "recipe_names",
    "recipe_text",
    "resolve",
    "validated",
    "value_of",
    "with_options",
]

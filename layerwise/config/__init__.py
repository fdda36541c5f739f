"""The options of a run: what there are, and one Config from all the places where they are given."""

from layerwise.config.commented import commented
from layerwise.config.functions import (
    function_flags,
    named_functions,
    named_here,
    refuse_function,
    refuse_other_network,
)
from layerwise.config.listing import Option, changed_options, options, value_of
from layerwise.config.names import ARRAYS, DATA_KINDS, FUNCTION, OWN, PICTURES, TORCHVISION
from layerwise.config.options import CacheOptions, Config, DataOptions, NetOptions, ObjectiveOptions, TrainingOptions
from layerwise.config.resolving import (
    load,
    parse_assignment,
    parsed,
    recipe_names,
    recipe_text,
    resolve,
    with_options,
)
from layerwise.config.result import result_toml, without_places

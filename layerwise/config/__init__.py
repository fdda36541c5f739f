"""The options of a run: what there are, and one Config from all the places where they are given."""

from layerwise.config.commented import commented
from layerwise.config.functions import (
    function_flags,
    named_functions,
    named_here,
    refuse_function,
    refuse_other_network,
)
from layerwise.config.options import (
    ARRAYS,
    DATA_KINDS,
    FUNCTION,
    OWN,
    PICTURES,
    TORCHVISION,
    CacheOptions,
    Config,
    DataOptions,
    NetOptions,
    ObjectiveOptions,
    Option,
    TrainingOptions,
    changed_options,
    options,
    section_titles,
    value_of,
)
from layerwise.config.resolving import (
    load,
    parse_assignment,
    parsed,
    recipe_names,
    recipe_text,
    resolve,
    result_toml,
    with_options,
    without_places,
)

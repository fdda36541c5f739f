"""Names what a cache was made from: everything that could change one of its bits."""

import hashlib
import json

from layerwise.config import Config, options, value_of


def training_key(
    config: Config,
    data_identity: str,
    below: str | None,
    before: str | None,
    stage: int,
    layers: range,
    optimization: str | None,
) -> str:
    """SHA-256 of the input of a stage and of all options that act on its result.

    below, before: fingerprints of the stage below in this round, and of this stage in the round before. optimization: the
    identity of an optimizer of the user's.
    """
    acting = {option.key: value_of(config, option.key) for option in options() if option.scope != "place"}
    return _digest([data_identity, below, before, stage, layers.start, layers.stop, acting, optimization])


def fingerprint(key: str, weights_digest: str) -> str:
    """SHA-256 of a stage's training key and the weights that came of it."""
    return _digest([key, weights_digest])


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

"""The options of a run that is there, for a command that names its folder and says no more."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.config import Config, named_functions, resolve_again
from layerwise.errors import ConfigError
from layerwise.run_store.state import RunState
from layerwise.run_store.store import RunStore, open_run

_DEFAULT = "cache"
"""Folder of the caches, beside the folder of the run or one above it."""


def own_options(given: Mapping[str, Any]) -> Config | None:
    """Those of the run in the folder that is given as "out", with what else is given in place of its own.

    given: values by dotted keys. None where no run is there, or data are given: then the command says what it wants, whole. A
    function, of data or network, that the run names must be given too, and does not count as such. Raises RunError where its
    run.json cannot be read, ConfigError where its caches lie where it alone says, and as `resolve_again`.
    """
    out = given.get("out")
    if not out or not (Path(str(out)).expanduser() / "run.json").exists():
        return None
    store, state = open_run(Path(str(out)).expanduser())
    if given.get("data.source") not in (None, named_functions(state.config).get("data.source")):
        return None
    here = {} if given.get("cache.dir") else _own_caches(store, state)
    return resolve_again(state.config, store.state, {**here, **given})


def _own_caches(store: RunStore, state: RunState) -> dict[str, str]:
    """The folder of caches that the run has recorded, as "cache.dir"; empty where it is the default.

    Raises ConfigError where it lies elsewhere: run.json may be somebody else's, and would say where this command writes.
    """
    caches = store.recorded_caches(state)
    if caches is None or caches.parent == Path(_DEFAULT).resolve():
        return {}
    out = store.out.resolve()  # links below it may be somebody else's, and are not followed
    beside = (out.parent / _DEFAULT, out.parent.parent / _DEFAULT)
    if caches.parent not in beside and not caches.parent.is_relative_to(out):
        raise ConfigError(
            f"The caches of {store.out} lie in {caches}, as its run.json alone says; if that is right, say so in the command: "
            f"--cache-dir {caches.parent}."
        )
    return {"cache.dir": str(caches.parent)}

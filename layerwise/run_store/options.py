"""The options of a run that is there, for a command that names its folder and says no more."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.config import Config, named_functions, resolve_again
from layerwise.run_store.store import open_run


def own_options(given: Mapping[str, Any]) -> Config | None:
    """Those of the run in the folder that is given as "out", with what else is given in place of its own.

    given: values by dotted keys. None where no run is there, or data are given: then the command says what it wants, whole. A
    function, of data or network, that the run names must be given too, and does not count as such. Its caches are looked for
    where it has recorded them. Raises RunError where its run.json cannot be read, ConfigError as `resolve_again`.
    """
    out = given.get("out")
    if not out or not (Path(str(out)).expanduser() / "run.json").exists():
        return None
    store, state = open_run(Path(str(out)).expanduser())
    if given.get("data.source") not in (None, named_functions(state.config).get("data.source")):
        return None
    caches = store.recorded_caches(state)
    here = {} if caches is None or caches.parent == Path("cache").resolve() else {"cache.dir": str(caches.parent)}
    return resolve_again(state.config, store.state, {**here, **given})

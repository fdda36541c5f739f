"""A run on disk: its files, its locks, and its state in run.json."""

from layerwise.run_store.options import own_options
from layerwise.run_store.state import EarlierTraining, ProbeResult, Restarts, RunState, StageRecord
from layerwise.run_store.store import RunStore, cache_files, open_run

__all__ = [
    "EarlierTraining",
    "ProbeResult",
    "Restarts",
    "RunState",
    "RunStore",
    "StageRecord",
    "cache_files",
    "open_run",
    "own_options",
]

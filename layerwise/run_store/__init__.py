"""A run on disk: its files, its locks, and its state in run.json."""

from layerwise.run_store.own_files import cache_files
from layerwise.run_store.state import RunState, StageRecord
from layerwise.run_store.store import Restarts, RunStore, open_run

__all__ = ["Restarts", "RunState", "RunStore", "StageRecord", "cache_files", "open_run"]

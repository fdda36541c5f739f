"""A run on disk: its files, its locks, and its state in run.json."""

from layerwise.run_store.state import ProbeResult, Restarts, RunState, StageRecord
from layerwise.run_store.store import RunStore, cache_files, open_run

__all__ = ["ProbeResult", "Restarts", "RunState", "RunStore", "StageRecord", "cache_files", "open_run"]

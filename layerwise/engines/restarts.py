"""Whether a batch job that is started again and again gets anywhere: restarts.json in the run directory."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from layerwise.errors import RunError
from layerwise.files import write_atomically
from layerwise.run_directory import RunPaths, RunState

MOST = 3
"""Starts in a row that may end where they began."""


def count_restart(paths: RunPaths, restarts: int) -> None:
    """Notes where the run stands; to be called when a start has been stopped and the job is about to be queued again.

    restarts: how often the job was started again before; at 0 a person has submitted it, and counting begins. Raises RunError
    where MOST starts in a row got nowhere.
    """
    if not paths.state.exists():
        # Nothing is noted in a folder that is not a run's yet; Slurm's own count must do.
        in_vain = restarts
    else:
        here, earlier = _where_it_stands(paths), _read(paths.restarts)
        in_vain = earlier["in_vain"] + 1 if restarts and earlier["stands"] == here else 0
        content = {"stands": here, "in_vain": in_vain}
        write_atomically(paths.restarts, (json.dumps(content, indent=2) + "\n").encode())
    if in_vain >= MOST:
        raise RunError(
            f"This job was started {in_vain} times in a row and each time stopped before {paths.out} had got any further, so "
            "it is not queued again; see log.txt there, give the job more time, and submit it anew."
        )


def _where_it_stands(paths: RunPaths) -> list[Any]:
    """Of every stage its status, epochs and checkpoint; and the bytes of the caches, whole ones and half-written ones."""
    state = RunState.load(paths.state)
    caches = sum(path.stat().st_size for path in paths.caches.glob("stage-*")) if paths.caches.is_dir() else 0
    stages = [[each.status, each.epochs, _position(paths.checkpoint(each.stage))] for each in state.stages]
    return [*stages, caches]


def _position(checkpoint: Path) -> list[int] | None:
    """Epoch and step of a checkpoint; where it does not say, the time that it was written at, which always differs."""
    if not checkpoint.exists():
        return None
    try:
        with safe_open(checkpoint, "np") as file:
            progress = json.loads(file.metadata()["progress"])
        return [progress["epoch"], progress["step"]]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return [checkpoint.stat().st_mtime_ns]


def _read(path: Path) -> dict[str, Any]:
    """What was noted last; nothing where it cannot be read, for then there was no such start."""
    try:
        noted = json.loads(path.read_text())
        return {"stands": noted["stands"], "in_vain": int(noted["in_vain"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"stands": None, "in_vain": 0}

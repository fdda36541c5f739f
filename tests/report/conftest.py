"""What the tests of the report look at: a small run with everything, and comparisons made from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_report import HOSTILE, METHODS, add_confusion, outcome


@pytest.fixture
def run_directory(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with two probes, one of them with a confusion matrix; a test may spoil it."""
    copy = shutil.copytree(small_run, tmp_path / "run")
    add_confusion(copy / "probes" / "digit.json", ["0", "1", "2", HOSTILE])
    return copy


@pytest.fixture
def comparison_directory(small_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """comparison_directory(**changes): a directory as `layerwise compare` leaves it, two of its methods with a run."""

    def make(**changes: object) -> Path:
        folder = tmp_path / "comparison"
        folder.mkdir()
        outcomes = [
            outcome(
                name,
                seed,
                [0.4 / (stage + place) + 0.01 * (seed - 1) for stage in (1, 2, 3, 4)],
                peak_bytes=1_000_000 * (place + 1),
                seconds=10.5 * place,
                disk_bytes=4_000_000 if place == 0 else 0,
            )
            for place, name in enumerate(METHODS)
            for seed in (0, 1, 2)
        ]
        about = {"label": "digit", "epochs": 2, "data_identity": "", "cut": [1, 1, 1, 1], "finished": True}
        tree = {**about, "outcomes": outcomes, **changes}
        (folder / "compare.json").write_text(json.dumps(tree))
        for name in METHODS[:2]:
            shutil.copytree(small_run, folder / "runs" / name / "seed-0")
        return folder

    return make

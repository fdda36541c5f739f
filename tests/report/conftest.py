"""What the tests of the report look at: a small run with everything, and comparisons made from it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_report import HOSTILE, METHODS, add_confusion, outcome

from layerwise.records import write_record
from layerwise.report.html import write_report
from layerwise.run_store import open_run


@pytest.fixture
def run_directory(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with two probes, one of them with a confusion matrix; a test may spoil it."""
    return _copied(small_run, tmp_path / "run")


@pytest.fixture
def comparison_directory(small_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """comparison_directory(**changes): a directory as `layerwise compare` leaves it, two of its methods with a run."""
    return lambda **changes: _comparison(small_run, tmp_path / "comparison", changes)


@pytest.fixture(scope="session")
def run_report(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of such a run, to be read."""
    return write_report(_copied(small_run, tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="session")
def comparison_report(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of such a comparison, to be read."""
    return write_report(_comparison(small_run, tmp_path_factory.mktemp("report") / "comparison", {}))


def _copied(run: Path, folder: Path) -> Path:
    """With its caches beside it."""
    store = open_run(run)[0]
    shutil.copytree(run, folder)
    shutil.copytree(store.caches, folder / os.path.relpath(store.caches, run))
    add_confusion(folder / "probes" / "digit.json", ["0", "1", "2", HOSTILE])
    return folder


def _comparison(run: Path, folder: Path, changes: dict[str, object]) -> Path:
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
    write_record(folder / "compare.json", {**about, "outcomes": outcomes, **changes})
    for name in METHODS[:2]:
        _copied(run, folder / "runs" / name / "seed-0")
    return folder

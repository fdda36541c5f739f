"""Finished runs that the tests of the encoder share: recordings and pictures, cached as float32, every stage kept."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerwise.config import resolve
from layerwise.engines.run import RunResult, UserObjects, run

Options = dict[str, dict[str, object]]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of noise in two class folders."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(20):
        path = folder / ("cat", "ship")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def run_tiny(tiny_options: Options, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunResult]:
    """run_tiny("speech" or "vision", source, UserObjects(), **{"dotted.key": value}): a finished run in its own folder."""

    def start(kind: str, source: str, objects: UserObjects | None = None, **changes: object) -> RunResult:
        folder = tmp_path_factory.mktemp(kind)
        places = {"data.source": source, "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
        short = {"training.max_epochs": 1, "cache.dtype": "float32"}
        return run(resolve(overrides={**tiny_options[kind], **places, **short, **changes}), objects or UserObjects())

    return start


@pytest.fixture(scope="session")
def speech_run(run_tiny: Callable[..., RunResult], digits: Path) -> RunResult:
    return run_tiny("speech", f"fsdd:{digits}", **{"net.centred": True, "net.dense": True})


@pytest.fixture(scope="session")
def vision_run(run_tiny: Callable[..., RunResult], pictures: Path) -> RunResult:
    return run_tiny("vision", f"images:{pictures}", **{"net.stem_stride": 1})  # frames of 2 x 2

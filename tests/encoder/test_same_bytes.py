"""A result does not say where it was made: the same training elsewhere gives the same bytes."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_python import ForkedPython
from records_edited import edited

import layerwise
from layerwise.cache import ActivationCache
from layerwise.cache.export import export as export_cache
from layerwise.encoder.export import write_onnx, write_pt2
from layerwise.encoder.load import entry_of, load_stages
from layerwise.encoder.model import Encoder
from layerwise.engines.run import RunResult
from layerwise.training.encoder import load_encoder

RunTiny = Callable[..., RunResult]
SAME = {
    "net.kernels": [10, 8],
    "net.strides": [5, 4],
    "net.paddings": [2, 2],
    "training.stages": 2,
    "memory.gpu_mem": "1GB",
}


@pytest.fixture(scope="module")
def twins(run_tiny: RunTiny, few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, RunResult]:
    """Two runs that differ in every name, folder, engine and device option alone, each probed."""
    here = run_tiny("convolutions", f"fsdd:{few_digits}", **SAME)
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(few_digits, folder / "the same digits")
    places = {
        "out": str(folder / "another-run"),
        "cache.dir": str(folder / "another-cache"),
        "engine.devices": "cpu",
        "training.device": "cpu",
        "training.checkpoint_seconds": 0,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", ForkedPython)
        there = run_tiny("convolutions", f"fsdd:{folder / 'the same digits'}", **SAME, **places)
    for result in (here, there):
        layerwise.probe(result.paths.out, "digit")
    return here, there


def places_of(result: RunResult) -> list[str]:
    config = result.config
    return [config.out, Path(config.out).name, config.cache.dir, config.data.source.partition(":")[2]]


def same_bytes(one: Path, other: Path, twins: tuple[RunResult, RunResult]) -> None:
    content = one.read_bytes()
    assert content == other.read_bytes(), one.name
    for result in twins:
        assert not [place for place in places_of(result) if len(place) > 3 and place.encode() in content], one.name


def test_the_encoder_and_the_caches(twins: tuple[RunResult, RunResult]) -> None:
    here, there = (result.paths for result in twins)
    same_bytes(here.encoder, there.encoder, twins)
    for stage in (1, 2):
        same_bytes(here.cache(stage), there.cache(stage), twins)


def test_a_folder_for_others_with_its_card(twins: tuple[RunResult, RunResult], tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, result in ((here, twins[0]), (there, twins[1])):
        layerwise.export(result.paths.out, folder)
    names = sorted(path.name for path in here.iterdir())
    assert names == sorted(path.name for path in there.iterdir()) == ["README.md", "config.toml", "encoder.safetensors"]
    for name in names:
        same_bytes(here / name, there / name, twins)
    same_bytes(here / "encoder.safetensors", twins[0].paths.encoder, twins)


@pytest.mark.parametrize("write", [write_pt2, write_onnx])
def test_programs(twins: tuple[RunResult, RunResult], write: Callable[..., object], tmp_path: Path) -> None:
    """Of the first stage alone, which takes a second to record."""
    if write is write_onnx:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    written = []
    for name, result in (("here", twins[0]), ("there", twins[1])):
        (tmp_path / name).mkdir()
        origin, stages = load_stages(result.paths.out, 1, None)
        write(Encoder(entry_of(origin), [stage.module for stage in stages]).eval(), origin, None, tmp_path / name)
        written.append(*(tmp_path / name).iterdir())
    same_bytes(*written, twins)


@pytest.mark.parametrize("ending", ["npy", "h5"])
def test_features(twins: tuple[RunResult, RunResult], ending: str, tmp_path: Path) -> None:
    for name, result in (("here", twins[0]), ("there", twins[1])):
        (tmp_path / name).mkdir()
        with ActivationCache(result.paths.cache(2)) as cache:
            export_cache(cache, tmp_path / name / f"cached.{ending}")
        recordings = result.config.data.source.partition(":")[2]
        layerwise.extract(result.paths.out, recordings, tmp_path / name / f"extracted.{ending}")
    files = sorted((tmp_path / "here").iterdir())
    assert len(files) == (4 if ending == "npy" else 2)
    for path in files:
        same_bytes(path, tmp_path / "there" / path.name, twins)


def test_an_encoder_says_what_data_it_was_trained_on_and_not_where_they_lay(twins: tuple[RunResult, RunResult]) -> None:
    config = load_encoder(twins[1].paths.encoder)[1].config
    assert (config.data.source, config.memory.gpu_mem, config.engine.devices) == ("fsdd", None, ())


def test_features_are_extracted_under_the_budget_of_the_run(twins: tuple[RunResult, RunResult], tmp_path: Path) -> None:
    """The encoder does not know it any more: it stands in the folder of the run."""
    shutil.copytree(twins[1].paths.out, tmp_path / "run")
    with edited(tmp_path / "run" / "run.json") as state:
        assert state["config"]["memory"]["gpu_mem"] == 1000000000
        state["config"]["memory"]["gpu_mem"] = 2000
    recordings = twins[0].config.data.source.partition(":")[2]
    with pytest.raises(layerwise.BudgetError, match="--gpu-mem of 2000 bytes"):
        layerwise.extract(tmp_path / "run", recordings, tmp_path / "features.npy")

"""Stages without a cache are probed on the frames that their cache would hold."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from records_edited import edited
from torch import nn

from layerwise.cache import ActivationCache
from layerwise.config import OWN, resolve
from layerwise.data.batches import Group, group_renderings
from layerwise.data.open import as_data, open_data
from layerwise.engines.run import RunResult, run
from layerwise.evaluate.examples import FeatureRows
from layerwise.evaluate.features import cached_features, features_under_budget
from layerwise.evaluate.probe import probe
from layerwise.evaluate.targets import probe_task
from layerwise.nets import build_network, shortest_sample
from layerwise.nets.network import ranges
from layerwise.nets.traced import traced_network
from layerwise.run_store.state import ProbeResult
from layerwise.stop import StopFlag
from layerwise.training.encoder import load_encoder
from layerwise.training.forward import OutputFormat, longest_piece, random_stages, trained_stages
from layerwise.training.spec import stage_specs


@pytest.fixture(scope="module")
def trained(
    digits: Path, tiny_options: dict[str, dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    """Stage 1 is cached as bfloat16, and those above, which were trained again later, as float32."""
    folder = tmp_path_factory.mktemp("mixed")
    places = {"data.source": f"fsdd:{digits}", "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
    options = {**tiny_options["convolutions"], **places, "training.stages": 4, "training.max_epochs": 1}
    run(resolve(overrides={**options, "cache.dtype": "bfloat16"}))
    return run(resolve(overrides={**options, "cache.dtype": "float32"}), from_stage=2)


@pytest.fixture(scope="module")
def with_caches(trained: RunResult) -> ProbeResult:
    """The probe of that run."""
    return probe(trained.paths.out, "digit")


@pytest.fixture
def mixed(trained: RunResult, with_caches: ProbeResult, tmp_path: Path) -> Iterator[RunResult]:
    """That run, which a test may spoil: it is put back afterwards."""
    places = {trained.paths.out: tmp_path / "kept", trained.paths.caches: tmp_path / "kept caches"}
    for place, kept in places.items():
        shutil.copytree(place, kept)
    yield trained
    for place, kept in places.items():
        shutil.rmtree(place)
        shutil.copytree(kept, place)


def features_without_caches(result: RunResult, handings: list[OutputFormat], folder: Path) -> list[np.ndarray]:
    """One array [samples, C] for each stage."""
    config, (weights, origin) = result.config, load_encoder(result.paths.encoder)
    data = open_data(config.data, shortest_sample(config))
    plans = stage_specs(config, data, build_network(config.net, data.frame_shape), ranges(origin.cut))
    stages = trained_stages(plans, handings, weights)
    task = probe_task("digit", data, config)
    files, _ = features_under_budget(config, task, stages, folder, StopFlag())
    return [everything(file) for file in files]


def features_of_the_cache(result: RunResult, stage: int, folder: Path) -> np.ndarray:
    config = result.config
    task = probe_task("digit", open_data(config.data, shortest_sample(config)), config)
    file = FeatureRows(folder)
    with ActivationCache(result.paths.cache(stage)) as cache:
        cached_features(cache, task, file)
    return everything(file)


def everything(file: FeatureRows) -> np.ndarray:
    return file.read(range(file.rows))


def test_each_stage_hands_over_in_the_dtype_that_it_was_cached_in(trained: RunResult, tmp_path: Path) -> None:
    handings = load_encoder(trained.paths.encoder)[1].handings
    assert [handing.dtype for handing in handings] == ["bfloat16", "float32", "float32", "float32"]
    passed = features_without_caches(trained, handings, tmp_path)
    unrounded = features_without_caches(trained, [OutputFormat("float32", None)] * 4, tmp_path)
    for stage in (2, 3, 4):
        cached = features_of_the_cache(trained, stage, tmp_path)
        far = np.abs(unrounded[stage - 1] - cached).max()
        assert np.abs(passed[stage - 1] - cached).max() < far / 20


def test_a_probe_finds_the_same_with_and_without_caches(mixed: RunResult, with_caches: ProbeResult) -> None:
    for stage in (1, 2, 4):
        mixed.paths.cache(stage).unlink()
    without = probe(mixed.paths.out, "digit")
    assert [each.error for each in without.stages] == pytest.approx(
        [each.error for each in with_caches.stages], abs=0.05
    )


def test_a_stage_below_that_is_being_cached_again_does_not_shift_the_others(
    mixed: RunResult, with_caches: ProbeResult
) -> None:
    with edited(mixed.paths.state) as state:
        state["stages"][1]["status"] = "caching"
    for stage in (2, 3):
        mixed.paths.cache(stage).unlink()
    found = probe(mixed.paths.out, "digit")
    assert [each.stage for each in found.stages] == [1, 3, 4]
    kept = [each for each in with_caches.stages if each.stage != 2]
    assert [each.error for each in found.stages] == pytest.approx([each.error for each in kept], abs=0.05)
    assert [each.untrained_error for each in found.stages] == [each.untrained_error for each in kept]


def test_a_probe_of_whole_samples_takes_no_more_at_once_than_their_caching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large pictures are one frame each: a piece of as many frames as a window of sound would hold all of them."""
    options = {
        "data.source": OWN,
        "net.name": OWN,
        "training.batch_size": 8,
        "objective.name": "ntxent",
        "data.views": 2,
    }
    config = resolve("whole", overrides=options)
    data = as_data([(torch.randn(1, 6, 6), f"kind {n % 2}") for n in range(64)], config.data)
    network = traced_network(nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 2)), (1, 6, 6))
    specs = stage_specs(config, data, network, network.natural_ranges)
    stages = random_stages(specs, [OutputFormat.of(config)] * len(specs), 0)
    sizes = []
    grouped = group_renderings

    def note_sizes(lengths: np.ndarray, piece: int) -> list[Group]:
        groups = grouped(lengths, piece)
        sizes.extend((group.stop - group.first) * group.longest for group in groups)
        return groups

    monkeypatch.setattr("layerwise.evaluate.features.group_renderings", note_sizes)
    features_under_budget(config, probe_task("label", data, config), stages, tmp_path, StopFlag())
    assert sum(sizes) == 64
    assert max(sizes) <= longest_piece(specs[0], config) == 4

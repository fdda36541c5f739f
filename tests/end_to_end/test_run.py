"""Whole runs on real recordings and pictures: what lies on the disk afterwards, and that the same seed gives the same bits."""

import json
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from layerwise.cache import ActivationCache
from layerwise.config import Config, resolve
from layerwise.data import open as demo
from layerwise.data.open import open_data
from layerwise.engines.run import run
from layerwise.evaluate.probe import probe
from layerwise.events import Event, StageDone
from layerwise.nets import build_network
from layerwise.run_store import RunState
from layerwise.training import fit as stage_training

Tiny = Callable[..., Config]


def encoders_equal(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_its_contract_says(tiny_speech: Tiny, digits: Path) -> None:
    events: list[Event] = []
    result = run(
        tiny_speech(f"fsdd:{digits}", **{"memory.gpu_mem": "50MB", "training.stages": 4}), notify=events.append
    )
    out = result.paths.out
    assert {path.name for path in out.iterdir()} >= {"config.toml", "run.json", "stages", "encoder.safetensors"}
    state = json.loads((out / "run.json").read_text())
    assert state["budget_bytes"] == 50_000_000
    assert [stage["status"] for stage in state["stages"]] == ["done"] * 4
    for stage in state["stages"]:
        assert 0 < stage["train_peak_bytes"] < 50_000_000
        assert 0 < stage["cache_peak_bytes"] < stage["train_peak_bytes"]
        assert stage["peak_bytes"] == stage["train_peak_bytes"]
        assert stage["cache_bytes"] == (out / state["caches"] / stage["cache"]).stat().st_size
        assert stage["epochs"] == 2
        assert stage["converged"] is False
        metrics = (out / "stages" / str(stage["stage"]) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in metrics] == [1, 2]
        assert min(json.loads(line)["held_out_loss"] for line in metrics) == stage["best_loss"]
    done = [event for event in events if isinstance(event, StageDone)]
    assert [event.stage for event in done] == [1, 2, 3, 4]
    assert all(event.device_bytes_left == 0 for event in done)
    assert tomllib.loads((out / "config.toml").read_text())["net"]["width"] == 8


def test_each_cache_is_the_output_of_the_stitched_encoder_on_whole_recordings(tiny_speech: Tiny, digits: Path) -> None:
    # Half the recordings are longer than one piece (4 windows of 0.05 s), so streaming is exercised.
    config = tiny_speech(f"fsdd:{digits}", **{"data.window": 400, "cache.dtype": "float32"})
    result = run(config)
    data = open_data(config.data, shortest=1)
    network = build_network(config.net, (1,))
    weights = load_file(result.paths.encoder)
    for stage in range(1, 5):
        module = network.build(range(stage), 0, "cpu")
        module.load_state_dict({name: torch.from_numpy(weights[name]) for name in module.state_dict()})
        with ActivationCache(result.paths.cache(stage)) as cache, torch.no_grad():
            for sample in (0, 17, 47):
                index = data.ids.index(cache.ids[sample])
                samples = data.read(index, 0, int(data.lengths[index]))[None]
                _, expected = module(samples, np.array([samples.shape[1]]))
                cached = cache.read(sample, 0, int(cache.lengths[sample]))
                torch.testing.assert_close(cached, expected[0], rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    tiny_speech: Tiny, digits: Path, tmp_path: Path
) -> None:
    source = f"fsdd:{digits}"
    first = run(tiny_speech(source))
    second = run(tiny_speech(source, out=str(tmp_path / "again")))
    other = run(tiny_speech(source, out=str(tmp_path / "other"), **{"training.seed": 1}))
    assert encoders_equal(first.paths.encoder, second.paths.encoder)
    assert not encoders_equal(first.paths.encoder, other.paths.encoder)
    for stage in range(1, 5):
        assert first.paths.cache(stage).read_bytes() == second.paths.cache(stage).read_bytes()


def test_pictures_are_trained_with_both_views(tiny_vision: Tiny, cifar10: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for kind in ("cat", "ship"):
        (folder / kind).mkdir(parents=True)
        for path in sorted((cifar10 / "train" / kind).iterdir())[:20]:
            (folder / kind / path.name).symlink_to(path)
    config = tiny_vision(f"images:{folder}")
    result = run(config)
    with ActivationCache(result.paths.cache(3)) as cache:
        assert cache.views == 1  # probes alone read it
        assert cache.columns == 7
        assert cache.lengths.tolist() == [49] * 40
        assert cache.frame_shape == (64, 1, 1)
    with ActivationCache(result.paths.cache(2)) as cache:
        assert cache.views == 2
        assert not torch.equal(cache.read(0, 0, 49, view=0), cache.read(0, 0, 49, view=1))
    table = probe(result.paths.out, "class")
    assert [stage.stage for stage in table.stages] == [1, 2, 3]
    assert all(stage.test == 8 and stage.train == 32 for stage in table.stages)


def test_one_stage_trains_the_network_end_to_end(tiny_speech: Tiny, digits: Path) -> None:
    result = run(tiny_speech(f"fsdd:{digits}", **{"training.stages": 1}))
    assert len(result.state.stages) == 1
    with ActivationCache(result.paths.cache(1)) as cache:
        assert cache.frame_shape == (8,)
        assert cache.layout.hop == 80


def test_the_held_out_and_test_recordings_are_never_trained_on(
    tiny_speech: Tiny, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: set[int] = set()
    epoch = stage_training.training_epoch

    def training_epoch(source: object, samples: np.ndarray, *rest: object) -> object:
        trained_on.update(samples.tolist())
        return epoch(source, samples, *rest)

    monkeypatch.setattr(stage_training, "training_epoch", training_epoch)
    result = run(tiny_speech(f"fsdd:{digits}"))
    with ActivationCache(result.paths.cache(1)) as cache:
        assert trained_on == set(np.flatnonzero(cache.layout.split == 0).tolist())
        tests = [name for name, split in zip(cache.ids, cache.layout.split, strict=True) if split == 2]
        assert all(name.endswith("_0.wav") for name in tests)
        assert len(tests) == 24


def test_a_stage_that_stops_improving_has_converged(tiny_speech: Tiny, digits: Path) -> None:
    # Nothing improves by half, so the plateau begins at once. Of this objective nobody knows what a guess would have.
    changes = {"training.min_delta": 0.5, "training.patience": 2, "training.max_epochs": 9}
    changes |= {"objective.name": "supervised", "objective.label": "digit"}
    state = run(tiny_speech(f"fsdd:{digits}", **changes)).state
    assert [(record.epochs, record.converged) for record in state.stages] == [(3, True)] * 4


def test_a_stage_that_sits_at_chance_has_not_converged(tiny_speech: Tiny, digits: Path) -> None:
    still = {"training.lr": 1e-12, "training.patience": 1, "training.max_epochs": 4, "training.stages": 1}
    state = run(tiny_speech(f"fsdd:{digits}", **still)).state
    assert [(record.epochs, record.converged) for record in state.stages] == [(4, False)]


def test_training_lowers_the_held_out_loss(tiny_speech: Tiny, digits: Path) -> None:
    long_enough = {"training.max_epochs": 80, "training.patience": 80, "training.stages": 2}
    result = run(tiny_speech(f"fsdd:{digits}", **long_enough, **{"training.lr": 3e-3}))
    for stage in (1, 2):
        lines = result.paths.metrics(stage).read_text().splitlines()
        losses = [json.loads(line)["held_out_loss"] for line in lines]
        assert min(losses) < 0.97 * np.log(5)  # five candidates by chance


def test_the_run_can_be_moved_and_read_elsewhere(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    result = run(tiny_speech(f"fsdd:{digits}"))
    result.paths.out.rename(tmp_path / "moved")
    assert RunState.load(tmp_path / "moved" / "run.json").done


def test_the_demo_needs_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(demo.synthesise_corpus, speakers=4, utterances=6, seconds=1.0)
    monkeypatch.setattr(demo, "synthesise_corpus", few)
    small = {"net.width": 4, "net.context": 4, "training.max_epochs": 1, "training.batch_size": 64}
    places = {"out": str(tmp_path / "demo"), "cache.dir": str(tmp_path / "cache")}
    result = run(resolve(overrides={**small, **places}))
    assert result.labels == ("speaker", "phone")
    phones = probe(result.paths.out, "phone")
    assert all(0 <= stage.error <= 1 for stage in phones.stages)
    assert (result.paths.out / "probes" / "phone.json").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_reduced_precision_and_other_cache_dtypes_train(tiny_speech: Tiny, digits: Path, dtype: str) -> None:
    changes = {"training.precision": "bfloat16", "cache.dtype": dtype, "memory.gpu_mem": "20MB", "training.stages": 4}
    result = run(tiny_speech(f"fsdd:{digits}", **changes))
    with ActivationCache(result.paths.cache(4)) as cache:
        rows = cache.read(3, 0, int(cache.lengths[3]))
    assert rows.dtype == getattr(torch, dtype)
    assert rows.isfinite().all()
    assert rows.any()

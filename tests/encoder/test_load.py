"""`layerwise.load`: what the loaded encoder gives is what the run cached, without the data and without the caches."""

import json
import os
import re
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from records_edited import edited
from safetensors.numpy import load_file
from torch import nn

import layerwise
from layerwise.cache import ActivationCache
from layerwise.config import load as read_config
from layerwise.config import resolve
from layerwise.data.open import open_demo
from layerwise.engines.run import RunResult, UserObjects, run
from layerwise.errors import ConfigError, DataError, RunError
from layerwise.events import silent
from layerwise.nets.traced import traced_network
from layerwise.training.checkpoint import load_arrays, save_arrays
from layerwise.training.encoder import load_encoder, save_encoder

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def waveform(digits: Path, name: str) -> torch.Tensor:
    """float32 [samples] as any audio library gives them."""
    return torch.from_numpy(soundfile.read(digits / name, dtype="float32")[0])


def pixels(pictures: Path, name: str) -> torch.Tensor:
    """uint8 [3, 32, 32] of a picture of 32 x 40, cropped as torchvision would."""
    return torch.from_numpy(np.array(Image.open(pictures / name))[4:36]).permute(2, 0, 1)


def test_a_waveform_gives_what_the_run_cached_at_every_stage(speech_run: RunResult, digits: Path) -> None:
    encoder = layerwise.load(speech_run.paths.out)
    assert not encoder.training
    assert next(encoder.parameters()).device.type == "cpu"
    for stage in range(1, 5):
        with ActivationCache(speech_run.paths.cache(stage)) as cache, torch.no_grad():
            for sample in (0, 17, 47):
                x = waveform(digits, cache.ids[sample])[None]
                cached = cache.read(sample, 0, int(cache.lengths[sample]))
                torch.testing.assert_close(encoder.stages(x)[stage - 1][0], cached, **CLOSE)
                if stage == 4:
                    torch.testing.assert_close(encoder(x)[0], cached, **CLOSE)


def test_pictures_give_what_the_run_cached_as_bytes_and_as_floats(vision_run: RunResult, pictures: Path) -> None:
    encoder = layerwise.load(vision_run.paths.out)
    with ActivationCache(vision_run.paths.cache(3)) as cache, torch.no_grad():
        x = torch.stack([pixels(pictures, name) for name in cache.ids])
        cached = torch.stack([cache.read(sample, 0, 49) for sample in range(len(cache.ids))])
        torch.testing.assert_close(encoder.stages(x)[-1], cached, **CLOSE)
        features = encoder(x)
        assert features.shape == (20, 49, 64)
        torch.testing.assert_close(features, cached.flatten(3).mean(3), **CLOSE)
        assert torch.equal(encoder(x / 255), features)


def test_padded_waveforms_give_what_they_give_alone(speech_run: RunResult, digits: Path) -> None:
    encoder = layerwise.load(speech_run.paths.out)
    alone = [waveform(digits, f"{digit}_theo_5.wav") for digit in range(3)]
    lengths = torch.tensor([len(samples) for samples in alone])
    batch = nn.utils.rnn.pad_sequence(alone, batch_first=True, padding_value=0.5)
    with torch.no_grad():
        features = encoder(batch, lengths)
        for row, samples, frames in zip(features, alone, encoder.out_length(lengths.numpy()).tolist(), strict=True):
            torch.testing.assert_close(row[:frames], encoder(samples[None])[0], **CLOSE)
            assert not row[frames:].any()


def test_neither_data_nor_caches_nor_stages_are_needed(run_tiny: Callable[..., RunResult], tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for number in range(6):
        samples = 0.03 * np.random.default_rng(number).standard_normal(3000)
        soundfile.write(recordings / f"{number}.wav", samples, 8000)
    result = run_tiny("speech", f"speech:{recordings}")
    x = waveform(recordings, "3.wav")[None]
    with ActivationCache(result.paths.cache(4)) as cache:
        cached = cache.read(3, 0, int(cache.lengths[3]))
    for folder in (recordings, result.paths.caches, result.paths.out / "stages"):
        shutil.rmtree(folder)
    for place in (result.paths.out, result.paths.encoder):
        torch.testing.assert_close(layerwise.load(place)(x)[0].detach(), cached, **CLOSE)


@pytest.mark.usefixtures("small_demo")
def test_the_demo_is_read_at_its_level(tiny_options: dict, tmp_path: Path) -> None:
    places = {"out": str(tmp_path / "run"), "cache.dir": str(tmp_path / "cache")}
    small = {"training.max_epochs": 1, "data.sample_rate": 16000, "cache.dtype": "float32"}
    result = run(resolve(overrides={**tiny_options["speech"], **places, **small}))
    demo = open_demo()
    x = torch.from_numpy(demo.read_values(7, 0, int(demo.lengths[7]), 0)[:, 0])[None]
    with ActivationCache(result.paths.cache(4)) as cache:
        cached = cache.read(7, 0, int(cache.lengths[7]))
    torch.testing.assert_close(layerwise.load(result.paths.out)(x)[0].detach(), cached, **CLOSE)


def test_lower_stages_can_be_taken_alone(speech_run: RunResult) -> None:
    x = torch.randn(2, 3000)
    whole, lower = layerwise.load(speech_run.paths.out), layerwise.load(speech_run.paths.out, stage=2)
    assert torch.equal(lower(x), whole.stages(x)[1])
    assert set(lower.state_dict()) < set(whole.state_dict()) == set(load_file(speech_run.paths.encoder))
    with pytest.raises(ConfigError, match="has stages 1 to 4"):
        layerwise.load(speech_run.paths.out, stage=5)


def test_a_network_of_the_users_own_is_given_again(run_tiny: Callable[..., RunResult], pictures: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    network = traced_network(model, (3, 8, 8))
    result = run_tiny("vision", f"images:{pictures}", UserObjects(network))
    x = torch.rand(2, 3, 32, 32)
    assert layerwise.load(result.paths.out, network=network)(x).shape == (2, 49, 8)
    with pytest.raises(ConfigError, match="give it as network="):
        layerwise.load(result.paths.out)
    with pytest.raises(ConfigError, match="not the one"):
        layerwise.load(result.paths.out, network=traced_network(nn.Sequential(nn.Linear(8, 8)), (3, 8, 8)))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3000), r"got float32 of shape \(3000,\); give waveforms \(B, samples\)"),
        (torch.zeros(2, 3000, dtype=torch.int16), "got int16"),
        (torch.randn(2, 20), "20 samples are too short; the encoder needs"),
    ],
)
def test_what_is_no_batch_of_waveforms_is_a_sentence(speech_run: RunResult, x: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        layerwise.load(speech_run.paths.out)(x)


@pytest.mark.parametrize("lengths", [[3000], [3000, 3001], [3000, 3], [1.5, 2.5]])
def test_lengths_that_do_not_fit_are_a_sentence(speech_run: RunResult, lengths: list[float]) -> None:
    with pytest.raises(DataError, match="do not fit; give a whole number for each of the 2 waveforms"):
        layerwise.load(speech_run.paths.out)(torch.randn(2, 3000), lengths)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(3, 32, 32), r"give colour pictures \(B, 3, H, W\) of at least 8 x 8"),
        (torch.rand(2, 1, 32, 32), "give colour pictures"),
        (torch.rand(2, 3, 32, 4), "at least 8 x 8"),
        (255 * torch.ones(2, 3, 32, 32), "pixels of up to 255; give floats from 0 to 1"),
    ],
)
def test_what_is_no_batch_of_pictures_is_a_sentence(vision_run: RunResult, x: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        layerwise.load(vision_run.paths.out)(x)


def test_a_run_that_is_not_finished_is_refused(speech_run: RunResult, tmp_path: Path) -> None:
    shutil.copy(speech_run.paths.state, tmp_path / "run.json")
    with edited(tmp_path / "run.json") as state:
        state["stages"][2]["status"] = "training"
    with pytest.raises(RunError, match="no encoder yet: stage 3 is not done; go on with the run first"):
        layerwise.load(tmp_path)
    with pytest.raises(RunError, match=r"holds no encoder\.safetensors"):
        layerwise.load(tmp_path.parent)
    with pytest.raises(RunError, match="There is no"):
        layerwise.load(tmp_path / "nowhere")


def test_files_that_do_not_fit_together_are_refused(speech_run: RunResult, tmp_path: Path) -> None:
    weights, origin = load_encoder(speech_run.paths.encoder)
    path = tmp_path / "encoder.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(RunError, match=message):
            layerwise.load(path)

    save_encoder(path, weights | {"layers.0.weight": np.zeros((8, 1, 3), np.float32)}, origin)
    refused(r"the shape of layers\.0\.weight is \(8, 1, 3\) and should be \(8, 1, 10\)")
    save_encoder(path, weights | {"layers.9.weight": np.zeros(3, np.float32)}, origin)
    refused(r"should be missing")
    save_encoder(path, weights, replace(origin, cut=[1, 1], handings=origin.handings[:2]))
    refused("cut into 2 layers, and its network has 4")
    for damaged in ({"level": 0.0}, {"level": float("nan")}, {"cut": [-4]}, {"handings": []}):
        save_encoder(path, weights, replace(origin, **damaged))
        refused("header of .* is damaged")
    save_arrays(path, weights, {"config": origin.config.to_toml()})
    refused("an earlier layerwise wrote it")
    path.write_bytes(b"not safetensors")
    refused("cannot be read")


HOSTILE: dict[str, dict[str, object]] = {
    "cut": {"cut": [1] * 100_000},
    "cut in all": {"cut": [10_000, 10_000, 1, 1]},
    "frame shape": {"frame_shape": [2**30, 2**30]},
    "frame shape of many axes": {"frame_shape": [1] * 1000},
    "a word": {"frame_shape": "many"},
    "a dtype that is none": {"handings": [{"precision": "float32", "dtype": "complex64"}] * 4},
    "a handing too much": {"handings": [{"precision": "float32", "dtype": None, "more": 1}] * 4},
    "another entry": {"takes": "pickles"},
    "a field too much": {"more": 1},
    "nested": {"cut": eval("[" * 50 + "]" * 50)},
    "window": {"config": "data.window"},
    "layers": {"config": "net.kernels"},
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_asks_for_the_impossible_is_a_sentence_and_takes_no_memory(
    speech_run: RunResult, tmp_path: Path, damage: dict[str, object]
) -> None:
    arrays, header = load_arrays(speech_run.paths.encoder, "")
    config = header["config"]
    match damage.get("config"):
        case "data.window":
            config = re.sub("window = .*", "window = 100000000000", config)
        case "net.kernels":
            for name in ("kernels", "strides", "paddings"):
                config = re.sub(rf"(?s){name} = \[.*?\]", f"{name} = [{'1,' * 1001}]", config)
        case _:
            header |= {"origin": json.dumps(json.loads(header["origin"]) | damage)}
    save_arrays(tmp_path / "encoder.safetensors", arrays, header | {"config": config})
    tracemalloc.start()
    with pytest.raises(RunError, match=r"header of .* is damaged"):
        layerwise.load(tmp_path)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 50_000_000


def test_toml_and_json_that_are_nested_without_end_are_sentences(speech_run: RunResult, tmp_path: Path) -> None:
    arrays, header = load_arrays(speech_run.paths.encoder, "")
    for name in ("config", "origin"):
        nested = f"{'a = ' * (name == 'config')}{'[' * 100_000}"
        save_arrays(tmp_path / "encoder.safetensors", arrays, header | {name: nested})
        with pytest.raises(RunError, match=r"header of .* is damaged"):
            layerwise.load(tmp_path)
    (tmp_path / "config.toml").write_text(f"a = {'[' * 100_000}")
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_config(tmp_path / "config.toml")


SPOIL: dict[str, Callable[[Path], object]] = {
    "bfloat16": lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"BF16"', 1)),
    "float4": lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F4" ', 1)),
    "complex": lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"C64"', 1)),
    "a long header": lambda path: path.write_bytes(b"\xff" * 7 + b"\0" + path.read_bytes()[8:]),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "larger than the memory": lambda path: os.truncate(path, 2**43),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
def test_what_is_no_safetensors_file_is_a_sentence(
    speech_run: RunResult, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    path = tmp_path / "encoder.safetensors"
    shutil.copy(speech_run.paths.encoder, path)
    spoil(path)
    with pytest.raises(RunError, match=r"encoder\.safetensors .*; name"):
        load_arrays(path, "name another one.")


def test_a_run_of_an_earlier_layerwise_is_completed_by_its_command(speech_run: RunResult, tmp_path: Path) -> None:
    weights, origin = load_encoder(speech_run.paths.encoder)
    save_arrays(speech_run.paths.encoder, weights, {"config": origin.config.to_toml()})
    run(speech_run.config)
    assert load_encoder(speech_run.paths.encoder)[1] == origin


def test_nothing_is_unpickled(speech_run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pickle.Unpickler", partial(pytest.fail, "unpickled"))
    monkeypatch.setattr("torch.load", partial(pytest.fail, "unpickled"))
    layerwise.load(speech_run.paths.out)


def test_an_encoder_of_long_frames_is_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(1, 4, 400, stride=400), nn.ReLU(), nn.Flatten(), nn.Linear(160, 8))
    options = {"data.frame_length": 16_000, "data.window": 8, "objective.steps": 1}
    streams = [torch.randn(8 * 16_000, 1) for _ in range(4)]
    places = {"out": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
    layerwise.run(model, streams, frames="steps", max_epochs=1, batch_size=2, notify=silent, options=options, **places)
    assert layerwise.load(tmp_path / "run", network=model)(streams[0][None]).shape == (1, 8, 8)

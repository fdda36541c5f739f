"""Networks of the user's own, here torchvision's, planned and run from pictures to encoder."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import nn
from torchvision.models import ResNet, resnet18
from torchvision.models.resnet import Bottleneck

import layerwise
from layerwise.cache import ActivationCache
from layerwise.config import Config
from layerwise.data.batches import READ_AHEAD
from layerwise.data.open import open_data
from layerwise.engines.plan import plan, reading_bytes
from layerwise.engines.run import RunResult, UserObjects, run
from layerwise.errors import BudgetError, ConfigError, Interrupted, LayerwiseError
from layerwise.events import CachingProgress, Event, StageDone, StepDone
from layerwise.forecast import Forecast, StageForecast
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network
from layerwise.stop import StopFlag
from layerwise.units import size

FRAME = (3, 16, 16)
TRACED = {
    "data.patch": 16,
    "data.patch_stride": 8,
    "data.crop": 32,
    "objective.steps": 1,
    "objective.skip": 0,
    "training.batch_size": 4,
    "training.max_epochs": 1,
    "cache.dtype": "float32",
    "cache.block": "32MiB",
}
"""Pictures of 32 pixels as 3 x 3 patches."""

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures of noise in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for kind in ("cat", "ship"):
        (folder / kind).mkdir()
        for number in range(8):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def wide() -> tuple[ResNet, Network]:
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    return model, traced_network(model, FRAME)


@pytest.fixture(scope="module")
def narrow() -> Network:
    """A ResNet with batch normalisation that trains in seconds."""
    torch.manual_seed(0)
    return traced_network(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=8, width_per_group=2), FRAME)


def test_a_resnet_is_planned_stage_by_stage(
    tiny_vision: Tiny, pictures: Path, wide: tuple[ResNet, Network], tmp_path: Path
) -> None:
    model, network = wide
    forecast = plan(tiny_vision(f"images:{pictures}", **TRACED), network=network)
    assert [stage.stage for stage in forecast.stages] == list(range(1, 12))
    assert sum(stage.parameters for stage in forecast.stages) == sum(p.numel() for p in model.parameters())
    assert forecast.fits
    assert forecast.budget_bytes is None
    # Parameters, gradients and two moments, and something to work with.
    assert all(stage.train_peak_bytes > 16 * stage.parameters for stage in forecast.stages)
    assert forecast.peak_bytes == max(max(s.train_peak_bytes, s.cache_peak_bytes) for s in forecast.stages)
    assert forecast.smallest_budget_bytes <= forecast.peak_bytes
    assert [stage.input for stage in forecast.stages] == ["data"] + ["cache"] * 10
    # Sixteen pictures in two views of 3 x 3 patches: 64 channels of 8 x 8 after the stem, 10 classes in the end.
    rows = 16 * 2 * 9
    assert forecast.stages[0].cache_bytes == rows * 64 * 8 * 8 * 4
    assert forecast.stages[-1].cache_bytes == rows // 2 * 10 * 4  # which probes alone read: one view
    assert forecast.cache_bytes == sum(stage.cache_bytes for stage in forecast.stages)
    below = forecast.cache_bytes - forecast.stages[-1].cache_bytes
    assert f"2 renderings of each sample, {size(below // 2)} for each" in forecast.notes[-1]
    assert not list(tmp_path.iterdir())


def test_batch_normalisation_is_planned_unsliced_and_what_it_costs_is_said(
    tiny_vision: Tiny, pictures: Path, narrow: Network
) -> None:
    options = {**TRACED, "training.stages": 2}
    free = plan(tiny_vision(f"images:{pictures}", **options), network=narrow)
    assert {stage.layout for stage in free.stages} == {"whole batch"}
    enough = plan(
        tiny_vision(f"images:{pictures}", **options, **{"memory.gpu_mem": free.smallest_budget_bytes}), network=narrow
    )
    assert enough.fits
    assert {stage.micro_batch for stage in enough.stages} == {4}
    assert "ties the samples of a batch together, so the batch cannot be sliced" in " ".join(
        s.why for s in enough.stages
    )
    less = plan(
        tiny_vision(f"images:{pictures}", **options, **{"memory.gpu_mem": free.smallest_budget_bytes - 1}),
        network=narrow,
    )
    assert not less.fits
    assert [stage.fits for stage in less.stages].count(False) == 1


@pytest.fixture(scope="module")
def trained(
    planned_stages: Callable[..., tuple[Config, object]],
    pictures: Path,
    narrow: Network,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunResult, list[Event]]:
    """A run of two stages that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    places = {"data.source": f"images:{pictures}", "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
    config, _ = planned_stages("vision", narrow, **TRACED, **places, **{"training.stages": 2})
    events: list[Event] = []
    return run(config, UserObjects(narrow), notify=events.append), events


def bits(path: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(path).items()}


def test_a_given_network_trains_from_pictures_to_encoder(trained: tuple[RunResult, list[Event]]) -> None:
    result, events = trained
    assert result.state.done
    assert [record.micro_batch for record in result.state.stages] == [4, 4]
    assert all(math.isfinite(record.best_loss) for record in result.state.stages)
    assert [event.device_bytes_left for event in events if isinstance(event, StageDone)] == [0, 0]


def test_its_encoder_is_its_stages_and_computes_what_they_cached(
    trained: tuple[RunResult, list[Event]], narrow: Network
) -> None:
    result, _ = trained
    encoder = load_file(result.paths.encoder)
    stages = [load_file(result.paths.weights(stage)) for stage in (1, 2)]
    assert sum(map(len, stages)) == len(encoder)
    for weights in stages:
        assert all(np.array_equal(encoder[name], value) for name, value in weights.items())
    module = narrow.build(range(len(narrow.layers)), 0, "cpu").eval()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in encoder.items()})
    data = open_data(result.config.data, shortest=1)
    with ActivationCache(result.paths.cache(2)) as cache, torch.no_grad():
        assert cache.lengths.tolist() == [9] * 16
        for sample in (0, 9, 15):
            frames = data.read(data.ids.index(cache.ids[sample]), 0, 9)
            _, expected = module(frames[None], np.array([9]))
            torch.testing.assert_close(cache.read(sample, 0, 9), expected[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def forecast(trained: tuple[RunResult, list[Event]], narrow: Network) -> Forecast:
    return plan(trained[0].config, network=narrow)


def test_a_plan_is_the_contracts_json(forecast: Forecast) -> None:
    tree = json.loads(json.dumps(asdict(forecast)))
    assert tree.keys() >= {"budget_bytes", "fits", "smallest_budget_bytes", "stages"}
    required = {"stage", "parameters", "train_peak_bytes", "cache_peak_bytes", "micro_batch", "cache_bytes", "input"}
    for stage in tree["stages"]:
        assert stage.keys() >= required
        assert sum(stage["train_peak_by_kind"].values()) == stage["train_peak_bytes"]


def test_what_is_planned_is_what_the_run_took(trained: tuple[RunResult, list[Event]], forecast: Forecast) -> None:
    for stage, record in zip(forecast.stages, trained[0].state.stages, strict=True):
        assert 1 <= stage.train_peak_bytes / record.train_peak_bytes <= 1.05, f"stage {stage.stage}"
        assert 1 <= stage.cache_peak_bytes / record.cache_peak_bytes <= 1.05, f"stage {stage.stage}"
        assert stage.cache_bytes <= record.cache_bytes <= stage.cache_bytes + 2**16


def test_its_running_statistics_are_in_the_encoder(trained: tuple[RunResult, list[Event]]) -> None:
    encoder = load_file(trained[0].paths.encoder)
    counts = {name: int(value) for name, value in encoder.items() if name.endswith("num_batches_tracked")}
    steps = [event for event in trained[1] if isinstance(event, StepDone) and event.stage == 1]
    assert len(counts) == 17
    assert set(counts.values()) == {len(steps)}


@pytest.mark.parametrize(("kind", "number"), [(StepDone, 4), (CachingProgress, 3)])
def test_stopped_and_started_again_it_ends_with_the_same_bits(
    trained: tuple[RunResult, list[Event]],
    tiny_vision: Tiny,
    pictures: Path,
    narrow: Network,
    kind: type[Event],
    number: int,
) -> None:
    config = tiny_vision(f"images:{pictures}", **TRACED, **{"training.stages": 2})
    stop, seen = StopFlag(), 0

    def notify(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, kind)
        if seen == number:
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, UserObjects(narrow), stop=stop, notify=notify)
    result = run(config, UserObjects(narrow))
    assert bits(result.paths.encoder) == bits(trained[0].paths.encoder)
    for stage in (1, 2):
        assert result.paths.cache(stage).read_bytes() == trained[0].paths.cache(stage).read_bytes()


def test_a_budget_that_cannot_hold_a_batch_is_refused_before_anything_is_trained(
    tiny_vision: Tiny, pictures: Path, narrow: Network
) -> None:
    config = tiny_vision(f"images:{pictures}", **TRACED, **{"training.stages": 2, "memory.gpu_mem": "1MB"})
    with pytest.raises(BudgetError, match=r"BatchNorm2d\) ties the samples of a batch together.*--batch-size"):
        run(config, UserObjects(narrow))
    assert not Path(config.out).exists()


def test_frames_that_the_network_was_not_made_for_are_refused(
    tiny_vision: Tiny, pictures: Path, narrow: Network
) -> None:
    config = tiny_vision(f"images:{pictures}", **TRACED, **{"data.gray": True})
    with pytest.raises(ConfigError, match="does not take frames of 1 x 16 x 16"):
        plan(config, network=narrow)


def test_a_run_is_not_continued_with_another_network_of_the_same_shape(
    tiny_vision: Tiny, pictures: Path, narrow: Network
) -> None:
    config = tiny_vision(f"images:{pictures}", **TRACED, **{"training.stages": 2})
    stop = StopFlag()

    def notify(event: Event) -> None:
        if isinstance(event, StageDone):
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, UserObjects(narrow), stop=stop, notify=notify)
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    other = traced_network(ResNet(Bottleneck, [1] * 4, num_classes=8, width_per_group=2, norm_layer=norm), FRAME)
    with pytest.raises(LayerwiseError, match="network is not the one that"):
        run(config, UserObjects(other))
    assert run(config, UserObjects(narrow)).state.done


def test_a_window_that_is_longer_than_all_samples_is_planned_as_these_are(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((12, 40, 6)).astype(np.float32))

    def planned(window: int) -> list[StageForecast]:
        options = {"data.window": window, "objective.steps": 2}
        asked = {"frames": "steps", "batch_size": 4, "out": str(tmp_path / "run"), "options": options}
        return layerwise.plan(torch.nn.Linear(6, 5), f"npy:{tmp_path}/x.npy", **asked).stages

    measured = ("train_peak_bytes", "cache_peak_bytes", "flops", "moved_bytes", "cache_bytes")
    short, fitting, long = ([getattr(planned(window)[0], name) for name in measured] for window in (20, 40, 20_480))
    assert long == fitting
    assert long[0] > short[0]


def test_samples_that_are_too_short_for_the_objective_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((12, 2, 6), dtype=np.float32))
    with pytest.raises(
        ConfigError, match=r"The samples are too short: of the longest, 2 frames, the last stage sees 2"
    ):
        layerwise.plan(torch.nn.Linear(6, 5), f"npy:{tmp_path}/x.npy", frames="steps", options={"objective.skip": 1})


def test_batches_that_a_gpu_fetches_are_counted_as_torch_pins_them() -> None:
    """In powers of two; each is read before it is pinned."""
    assert reading_bytes(5_000_000, torch.device("cpu")) == (READ_AHEAD + 2) * 5_000_000
    assert reading_bytes(5_000_000, torch.device("cuda", 0)) == (READ_AHEAD + 2) * 2**23 + 5_000_000

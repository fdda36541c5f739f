"""A run whose caches are compressed trains to the same bits as any other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from layerwise.cache import ActivationCache
from layerwise.config import Config
from layerwise.engines.run import RunResult, run
from layerwise.errors import Interrupted
from layerwise.events import CachingProgress, Event, StageDone, StepDone
from layerwise.stop import StopFlag

Tiny = Callable[..., Config]


def weights(result: RunResult) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(result.paths.encoder).items()}


def activations(result: RunResult, stage: int) -> torch.Tensor:
    with ActivationCache(result.paths.cache(stage)) as cache:
        return torch.cat([cache.read(sample, 0, int(length)) for sample, length in enumerate(cache.lengths)])


def in_folder(config: Config, folder: Path, compression: str) -> Config:
    cache = config.cache.model_copy(update={"dir": str(folder / "cache"), "compression": compression})
    return config.model_copy(update={"out": str(folder / "run"), "cache": cache})


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_compressed_run_ends_with_the_same_bits(tiny_speech: Tiny, digits: Path, tmp_path: Path, dtype: str) -> None:
    config = tiny_speech(f"fsdd:{digits}", **{"cache.dtype": dtype})
    raw, packed = (run(in_folder(config, tmp_path / name, name)) for name in ("none", "zstd"))
    assert weights(packed) == weights(raw)
    for stage in (1, 2, 3, 4):
        assert torch.equal(activations(packed, stage), activations(raw, stage))
        assert packed.paths.cache(stage).stat().st_size == packed.state.record(stage).cache_bytes


@pytest.mark.parametrize("kind", [StepDone, CachingProgress, StageDone])
def test_a_compressed_run_that_was_stopped_goes_on(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, kind: type[Event]
) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    expected = run(in_folder(config, tmp_path / "undisturbed", "zstd"))
    stop = StopFlag()

    def stop_in_stage_2(event: Event) -> None:
        if isinstance(event, kind) and event.stage == 2:
            stop.reason = "a test"

    here = in_folder(config, tmp_path, "zstd")
    with pytest.raises(Interrupted):
        run(here, stop=stop, notify=stop_in_stage_2)
    again = run(here)
    assert weights(again) == weights(expected)
    for stage in (1, 2, 3, 4):
        assert again.paths.cache(stage).read_bytes() == expected.paths.cache(stage).read_bytes()


def test_compression_may_change_between_two_starts(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    config = tiny_speech(f"fsdd:{digits}")
    expected = run(in_folder(config, tmp_path / "undisturbed", "none"))
    stop = StopFlag()

    def stop_after_stage_2(event: Event) -> None:
        if isinstance(event, StageDone) and event.stage == 2:
            stop.reason = "a test"

    with pytest.raises(Interrupted):
        run(in_folder(config, tmp_path, "zstd"), stop=stop, notify=stop_after_stage_2)
    result = run(in_folder(config, tmp_path, "none"))
    assert weights(result) == weights(expected)
    for stage, compression in ((1, "zstd"), (2, "zstd"), (3, "none"), (4, "none")):
        with ActivationCache(result.paths.cache(stage)) as cache:
            assert cache.layout.compression == compression

"""A run whose caches are compressed trains to the same bits as any other."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from layerwise.cache import ActivationCache
from layerwise.config import Config, resolve
from layerwise.engines.run import RunResult, run
from layerwise.errors import Interrupted
from layerwise.events import CachingProgress, Event, StageDone, StepDone
from layerwise.stop import StopFlag


def weights(result: RunResult) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(result.paths.encoder).items()}


def activations(result: RunResult, stage: int) -> torch.Tensor:
    with ActivationCache(result.paths.cache(stage)) as cache:
        return torch.cat([cache.read(sample, 0, int(length)) for sample, length in enumerate(cache.lengths)])


def in_folder(config: Config, folder: Path, compression: str) -> Config:
    cache = config.cache.model_copy(update={"dir": str(folder / "cache"), "compression": compression})
    return config.model_copy(update={"out": str(folder / "run"), "cache": cache})


@pytest.fixture(scope="module")
def undisturbed(
    few_digits: Path, tiny_options: dict[str, dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], RunResult]:
    """undisturbed(dtype, compression): a finished run with such caches, to be read and not changed."""

    @cache
    def finish(dtype: str, compression: str) -> RunResult:
        options = {"data.source": f"fsdd:{few_digits}", "training.max_epochs": 1, "cache.dtype": dtype}
        config = resolve(overrides={**tiny_options["convolutions"], **options})
        return run(in_folder(config, tmp_path_factory.mktemp("undisturbed"), compression))

    return finish


Undisturbed = Callable[[str, str], RunResult]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_compressed_run_ends_with_the_same_bits(undisturbed: Undisturbed, dtype: str) -> None:
    raw, packed = (undisturbed(dtype, compression) for compression in ("none", "zstd"))
    assert weights(packed) == weights(raw)
    for stage in (1, 2, 3, 4):
        assert torch.equal(activations(packed, stage), activations(raw, stage))
        assert packed.paths.cache(stage).stat().st_size == packed.state.record(stage).cache_bytes


@pytest.mark.parametrize("kind", [StepDone, CachingProgress, StageDone])
def test_a_compressed_run_that_was_stopped_goes_on(undisturbed: Undisturbed, tmp_path: Path, kind: type[Event]) -> None:
    expected = undisturbed("float16", "zstd")
    stop = StopFlag()

    def stop_in_stage_2(event: Event) -> None:
        if isinstance(event, kind) and event.stage == 2:
            stop.reason = "a test"

    here = in_folder(expected.config, tmp_path, "zstd")
    with pytest.raises(Interrupted):
        run(here, stop=stop, notify=stop_in_stage_2)
    again = run(here)
    assert weights(again) == weights(expected)
    for stage in (1, 2, 3, 4):
        assert again.paths.cache(stage).read_bytes() == expected.paths.cache(stage).read_bytes()


def test_compression_may_change_between_two_starts(undisturbed: Undisturbed, tmp_path: Path) -> None:
    expected = undisturbed("float16", "none")
    config = expected.config
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

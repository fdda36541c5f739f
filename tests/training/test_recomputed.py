"""Recomputed equals cached: windows, pieces and short samples, at every place of a sample."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.config import Config
from layerwise.data.batches import Batch, Window, group_renderings, training_epoch
from layerwise.data.images import patch_options, picture_set
from layerwise.data.source import DataSet
from layerwise.memory.meter import Meter
from layerwise.nets.module import Module
from layerwise.training.forward import InferenceStage, OutputFormat
from layerwise.training.inference_peak import recomputing_peak
from layerwise.training.loader import SourceLoader
from layerwise.training.recompute import RecomputingLoader
from layerwise.training.spec import StageSpec

CPU = torch.device("cpu")
Planned = Callable[..., tuple[Config, list[StageSpec]]]


@contextlib.contextmanager
def not_parked() -> Iterator[None]:
    yield


class Outputs:
    """The outputs of some modules on whole samples of a data set, in memory: what a float32 cache holds."""

    def __init__(self, data: DataSet, modules: list[Module]) -> None:
        self.columns, self.views = data.columns, data.views
        self._samples = {}
        for sample, length in enumerate(data.lengths.tolist()):
            for view in range(data.views):
                frames, lengths = data.read(sample, 0, length, view)[None], np.array([length])
                with torch.no_grad():
                    for module in modules:
                        frames, lengths = module(frames, lengths)[1], module.out_length(lengths)
                self._samples[sample, view] = frames[0]
        self.lengths = np.array([len(self._samples[sample, 0]) for sample in range(len(data.lengths))])

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        return self._samples[sample, view][start:stop]


def both_feeds(
    kind: str, planned: Planned, noise: Callable[..., DataSet], stages: int, windows: int = 3
) -> tuple[RecomputingLoader, SourceLoader, Window, Config]:
    """The input of stage `stages` + 1, recomputed from the data, and read from the outputs of the stages below."""
    config, plans = planned(kind, **{"cache.dtype": "float32"})
    data = noise(config)
    if kind == "speech":
        data = replace(data, lengths=np.array([6400, 1300, 5001, 700, 1600, 6399]))
        plans = [replace(plan, **lengths_of(plan, plans, data)) for plan in plans]
    modules = [plan.build_module(0, CPU).eval() for plan in plans[:stages]]
    output_format = OutputFormat.of(config)
    frozen = [InferenceStage(plan.stage, module, output_format) for plan, module in zip(plans, modules, strict=False)]
    recomputed = RecomputingLoader(data, plans[:stages], frozen, windows, CPU)
    return recomputed, SourceLoader(Outputs(data, modules)), plans[stages].window, config


def lengths_of(plan: StageSpec, plans: list[StageSpec], data: DataSet) -> dict[str, np.ndarray]:
    lengths = data.lengths
    for below in plans[: plan.stage - 1]:
        lengths = below.build_module(0, torch.device("meta")).out_length(lengths)
    return {"lengths": lengths, "output_lengths": plan.build_module(0, torch.device("meta")).out_length(lengths)}


def assert_same(recomputed: Iterator[Batch], read: Iterator[Batch]) -> None:
    count = 0
    for one, other in zip(recomputed, read, strict=True):
        assert one.lengths.tolist() == other.lengths.tolist()
        torch.testing.assert_close(one.frames, other.frames, rtol=1e-5, atol=1e-6)
        count += 1
    assert count


@pytest.mark.parametrize("kind", ["speech", "vision"])
@pytest.mark.parametrize("stages", [1, 2])
def test_recomputed_windows_are_those_of_a_cache(
    planned_stages: Planned, noise_data: Callable[..., DataSet], kind: str, stages: int
) -> None:
    recomputed, read, window, _ = both_feeds(kind, planned_stages, noise_data, stages)
    assert recomputed.lengths.tolist() == read.lengths.tolist()
    samples = np.arange(len(read.lengths))
    for seed in range(3):
        epoch = training_epoch(read, samples, window, 3, np.random.default_rng(seed))
        assert_same(recomputed.batches(epoch, 0, not_parked), read.batches(epoch, 0, not_parked))
        assert_same(recomputed.batches(epoch, 1, not_parked), read.batches(epoch, 1, not_parked))


def test_of_pictures_windows_at_any_pixel_are_recomputed(planned_stages: Planned) -> None:
    config, plans = planned_stages("vision", **{"cache.dtype": "float32"})
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    data = picture_set(lambda sample: pictures[sample], patch_options(config.data), list("abcd"), "", {})
    modules = [plan.build_module(0, CPU).eval() for plan in plans[:2]]
    frozen = [InferenceStage(n, module, OutputFormat.of(config)) for n, module in enumerate(modules, start=1)]
    recomputed = RecomputingLoader(data, plans[:2], frozen, 3, CPU)
    epoch = training_epoch(recomputed, np.arange(4), plans[2].window, 4, rng)
    (batch,) = recomputed.batches(epoch, 0, not_parked)
    assert (epoch.tops % config.data.patch_stride).any()
    with torch.no_grad():
        frames = epoch.read(data, 0).frames
        for module in modules:
            frames = module(frames, batch.lengths)[1]
    torch.testing.assert_close(batch.frames, frames, rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(piece=st.integers(1, 300), stages=st.integers(1, 2))
def test_recomputed_pieces_are_those_of_a_cache(
    planned_stages: Planned, noise_data: Callable[..., DataSet], piece: int, stages: int
) -> None:
    recomputed, read, *_ = both_feeds("speech", planned_stages, noise_data, stages)
    groups = group_renderings(read.lengths, piece, read.views)
    assert_same(recomputed.pieces(groups, not_parked), read.pieces(groups, not_parked))


def test_blocks_change_nothing(
    planned_stages: Planned, noise_data: Callable[..., DataSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed, _, window, _ = both_feeds("speech", planned_stages, noise_data, 2)
    epoch = training_epoch(recomputed, np.arange(6), window, 2, np.random.default_rng(0))
    whole = list(recomputed.batches(epoch, 0, not_parked))
    monkeypatch.setattr("layerwise.training.recompute.BLOCK_BYTES", 1)
    blocks = []

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        blocks.append(None)
        yield

    one_by_one = list(recomputed.batches(epoch, 0, counted))
    assert len(blocks) == len(whole) == 3
    for one, other in zip(whole, one_by_one, strict=True):
        assert torch.equal(one.frames, other.frames)


@pytest.mark.parametrize("kind", ["speech", "vision"])
@pytest.mark.parametrize("windows", [1, 3])
def test_the_device_holds_what_is_predicted_and_in_the_end_nothing(
    planned_stages: Planned, noise_data: Callable[..., DataSet], kind: str, windows: int
) -> None:
    recomputed, _, window, config = both_feeds(kind, planned_stages, noise_data, 2, windows)
    plans = tuple(recomputed._specs)
    epoch = training_epoch(recomputed, np.arange(6), window, 3, np.random.default_rng(0))
    with Meter(CPU) as meter:
        for _ in recomputed.batches(epoch, 0, not_parked):
            pass
        assert meter.live == 0
    predicted = recomputing_peak(config, plans, windows, window.frames)
    assert 0.95 * predicted <= meter.peak <= predicted


def test_where_the_windows_do_not_fit_fewer_go_at_once(
    planned_stages: Planned, noise_data: Callable[..., DataSet]
) -> None:
    recomputed, _, window, config = both_feeds("speech", planned_stages, noise_data, 2, windows=4)
    epoch = training_epoch(recomputed, np.arange(6), window, 4, np.random.default_rng(0))
    expected = list(recomputed.batches(epoch, 0, not_parked))
    limit, needed = (recomputing_peak(config, tuple(recomputed._specs), n, window.frames) for n in (1, 4))
    assert limit < needed
    with Meter(CPU, limit=limit):
        found = list(recomputed.batches(epoch, 0, not_parked))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.frames, other.frames, rtol=1e-5, atol=1e-6)

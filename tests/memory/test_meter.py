"""The meter counts live storages, whatever happens to the tensors on them."""

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ByteSize
from torch import nn

from layerwise.config import Config
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.engines.run import run
from layerwise.errors import BudgetError
from layerwise.memory.estimate import predicted_peak
from layerwise.memory.meter import Meter
from layerwise.training.budget import caching_peak, check_budget, training_peak
from layerwise.training.plan import plan_stages

CPU = torch.device("cpu")
KILO = 250  # float32 values in 1000 bytes


def test_live_bytes_follow_creation_and_deletion() -> None:
    with Meter(CPU) as meter:
        first = torch.zeros(KILO)
        second = torch.ones(2 * KILO)
        assert meter.live == 3000
        del first
        assert (meter.live, meter.peak) == (2000, 3000)
        meter.reset_peak()
        assert meter.peak == 2000
        del second
    assert meter.live == 0


def test_views_and_in_place_results_share_their_storage() -> None:
    with Meter(CPU) as meter:
        x = torch.zeros(KILO)
        views = [x[10:], x.view(-1, 1), x.add_(1), x.detach()]
        assert meter.live == 1000
        del x
        assert meter.live == 1000
        del views
        assert meter.live == 0


def test_tensors_that_only_autograd_holds_count() -> None:
    with Meter(CPU) as meter:
        x = torch.ones(KILO, requires_grad=True)
        y = (x.exp() * 2).sum()
        assert meter.live == 2000 + 4  # x, exp(x) saved for the backward pass, y
        y.backward()
        assert meter.live == 2000 + 4  # x, its gradient, y
        x.grad = None
        del x, y
        gc.collect()
        assert meter.live == 0


def test_a_resized_storage_counts_at_its_new_size() -> None:
    with Meter(CPU) as meter:
        x = torch.zeros(KILO)
        x.resize_(3 * KILO)
        assert meter.live == 3000


def test_tensors_made_outside_do_not_count() -> None:
    outside = torch.zeros(KILO)
    with Meter(CPU) as meter:
        assert meter.live == 0
        inside = outside.clone()
        assert meter.live == 1000
        del inside


def test_the_limit_is_kept() -> None:
    with Meter(CPU, limit=2500) as meter:
        kept = torch.zeros(KILO)
        with pytest.raises(BudgetError, match="2,500 bytes"):
            torch.zeros(2 * KILO)
        del kept
        assert meter.peak == 3000


def test_a_prediction_equals_the_measurement_of_the_same_work() -> None:
    def work() -> None:
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        for _ in range(2):
            model(torch.zeros(16, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    with Meter(CPU) as meter:
        work()
    assert predicted_peak(work, CPU) == meter.peak


@pytest.fixture
def planned(tiny_speech: Callable[..., Config], digits: object) -> tuple[Config, DataSet]:
    config = tiny_speech(f"fsdd:{digits}")
    return config, open_data(config.data, shortest=1)


def test_the_predicted_training_peak_is_the_measured_one(planned: tuple[Config, DataSet]) -> None:
    config, data = planned
    # Every recording fills this window, so full batches occur.
    config = config.model_copy(update={"data": config.data.model_copy(update={"window": 1200})})
    measured = [record.train_peak_bytes for record in run(config).state.stages]
    predicted = [training_peak(config, plan, CPU) for plan in plan_stages(config, data)]
    assert predicted == measured


@pytest.mark.parametrize("width", [2, 32])
def test_the_caching_pass_stays_below_its_prediction(planned: tuple[Config, DataSet], width: int) -> None:
    config, data = planned
    # Windows of 0.025 s: most recordings are longer than a piece and stream.
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"window": 200}),
            "net": config.net.model_copy(update={"width": width}),
        }
    )
    measured = [record.cache_peak_bytes for record in run(config).state.stages]
    predicted = [caching_peak(config, plan, CPU) for plan in plan_stages(config, data)]
    for real, expected in zip(measured, predicted, strict=True):
        assert 0.5 * expected < real <= expected


def test_a_budget_that_is_too_small_is_refused_with_what_is_needed(planned: tuple[Config, DataSet]) -> None:
    config, data = planned
    plans = plan_stages(config, data)
    needed = max(max(training_peak(config, plan, CPU), caching_peak(config, plan, CPU)) for plan in plans)

    def with_budget(size: int) -> Config:
        return config.model_copy(update={"memory": config.memory.model_copy(update={"gpu_mem": ByteSize(size)})})

    check_budget(with_budget(needed), plans, CPU)
    with pytest.raises(BudgetError, match=r"--gpu-mem .* is too small: stage \d needs .* MB"):
        check_budget(with_budget(needed - 1), plans, CPU)


def test_lengths_on_the_host_do_not_count() -> None:
    with Meter(CPU) as meter:
        np.zeros(1000)
        assert meter.live == 0


@pytest.mark.gpu
def test_the_meter_never_exceeds_what_the_allocator_reports() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Meter(device) as meter:
        model = nn.Linear(256, 256, device=device)
        model(torch.zeros(64, 256, device=device)).sum().backward()
    assert 0 < meter.peak <= torch.cuda.max_memory_allocated() - before

"""Other processes on the card, kernels that are loaded late, and budgets beyond the card."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_cases import CASES, EVERYWHERE, SPEECH, WAVES, opened, run_case
from simulated_gpu import GPU, SimulatedGPU
from torch_cuda import installed

from layerwise.config import resolve
from layerwise.engines import run as engine
from layerwise.engines.plan import plan
from layerwise.errors import BudgetError
from layerwise.events import Event, Message, StageStarted, StepDone
from layerwise.memory import driver
from layerwise.memory.driver import (
    LARGEST_CONTEXT,
    MARGIN,
    Card,
    cap,
    context_bytes,
    possible_segments,
    room_for_tensors,
)
from layerwise.memory.rates import Rates

MiB = 2**20
CASE = CASES["patches"]


def test_memory_of_others_is_not_ours_whether_it_comes_before_or_after(gpu: SimulatedGPU) -> None:
    cap(GPU, 10**9)
    before = gpu.allocator.allowed
    gpu.others += 2**30
    cap(GPU, 10**9)
    assert gpu.allocator.allowed == before == 10**9 - gpu.context - MARGIN
    with installed(SimulatedGPU(others=2 * 2**30)) as shared:
        assert shared.context <= context_bytes(GPU) <= LARGEST_CONTEXT
        cap(GPU, 10**9)
        assert shared.allocator.allowed > 0


def test_a_plan_never_has_more_than_the_card_has_free_and_says_so(tmp_path: Path) -> None:
    lines = []
    with installed(SimulatedGPU(others=3 * 2**30)) as gpu:
        assert room_for_tensors(GPU, 8 * 10**9) == gpu.free - MARGIN
        options = {"memory.gpu_mem": "8GB", "training.device": "cuda"}
        config, data, _ = opened(CASE, **options)
        (note,) = [note for note in plan(config, data=data).notes if "--gpu-mem" in note]
        assert "8000 MB is more than cuda:0 has for this process" in note
        run_case(
            CASE,
            "cuda",
            tmp_path,
            lambda event: lines.append(event.text) if isinstance(event, Message) else None,
            **{"memory.gpu_mem": "8GB"},
        )
        assert note in lines
    with (
        installed(SimulatedGPU(others=3 * 2**30 + 600 * MiB)),
        pytest.raises(BudgetError, match="has for this process"),
    ):
        run_case(CASE, "cuda", tmp_path / "full", **{"memory.gpu_mem": "8GB"})


def test_the_cap_follows_the_kernels_that_the_first_step_loads(
    gpu: SimulatedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, loaded, caps = 600 * 10**6, 30 * MiB, []
    monkeypatch.setattr(driver, "_driver_figure", lambda _: gpu.context + gpu.allocator.reserved)

    def note(event: Event) -> None:
        if isinstance(event, StageStarted):
            caps.append(gpu.allocator.allowed + gpu.context + MARGIN)
            gpu.context += loaded
        if isinstance(event, StepDone):
            assert gpu.allocator.allowed == budget - gpu.context

    state = run_case(CASE, "cuda", tmp_path, note, **{"memory.gpu_mem": f"{budget}B"}).state
    assert caps == [budget] * len(state.stages)
    assert state.stages[-1].driver_bytes == gpu.context + (state.stages[-1].allocator_bytes or 0)


@pytest.mark.parametrize("settings", ["", "expandable_segments:True", "max_split_size_mb:100"])
def test_the_allocator_is_left_as_the_user_has_set_it(
    gpu: SimulatedGPU, monkeypatch: pytest.MonkeyPatch, settings: str
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    ways = [segments.expandable for segments in possible_segments(GPU) if segments]
    assert ways == ([False, True] if not settings else [settings.startswith("expandable")])


@pytest.mark.parametrize(("configured", "size"), [("", 8_519_680), (":4096:8", 32 * MiB), (":16:8", 128 * 2**10)])
def test_workspaces_are_of_the_size_that_cublas_is_set_to(
    gpu: SimulatedGPU, monkeypatch: pytest.MonkeyPatch, configured: str, size: int
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", configured)
    assert driver.workspace_bytes(GPU) == 2 * size


def test_a_process_that_plans_for_others_takes_nothing_of_the_card(
    gpu: SimulatedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_another_process_found(device: torch.device) -> None:
        monkeypatch.setitem(driver.CARDS, device, Card(context=300 * MiB, free=3 * 2**30))
        monkeypatch.setitem(engine.measured_rates.__globals__["RATES"], device, Rates(1e12, 1e9))

    monkeypatch.setattr(engine, "measure_elsewhere", as_another_process_found)
    np.save(tmp_path / "streams.npy", np.stack([wave[:200] for wave, _ in WAVES]))
    config = resolve(
        overrides=EVERYWHERE
        | SPEECH
        | {"out": str(tmp_path / "run"), "cache.dir": str(tmp_path / "cache"), "memory.flops_per_byte": None}
        | {"engine.devices": ["cuda:0"], "memory.gpu_mem": "600MB", "data.source": f"npy:{tmp_path}/streams.npy"}
    )
    with engine.prepared_run(
        config, engine.UserObjects(), engine.StartRequest(None, False), engine.StopFlag(), lambda _: None
    ) as (prepared, tasks, _):
        assert tasks and prepared.memory_plans
    assert gpu.allocator.allocations == 0

"""A GPU is kept busy: a step of a whole batch is few kernels and one copy, and the host hardly ever waits for it."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_cases
import pytest
import torch
from gpu_cases import SPEECH, Case, run_case
from simulated_gpu import Counts, SimulatedGPU

from layerwise.errors import Interrupted, TrainingError
from layerwise.events import Event, StepDone, silent
from layerwise.memory.microbatch import Total
from layerwise.stop import StopFlag
from layerwise.training.budget import fit_stage
from layerwise.training.scores import READ_AT_ONCE
from layerwise.training.trainer import StageTrainer

KERNELS, COPIES, WAITS = 80, 2, 0.1
"""Most of a step."""
SIZES = {"net.kernels": [10], "net.strides": [5], "net.paddings": [2], "objective.steps": 12, "objective.negatives": 10}
CASE = Case(SPEECH | SIZES | {"objective.anchors": 32})
"""A convolution that reads the data, and a GRU that reads its cache; counts do not depend on the width."""


PAPERS = {
    "objective.steps": 12,
    "objective.negatives": 10,
    "objective.anchors": 128,
    "training.batch_size": 8,
    "data.window": 2560,
    "net.width": 128,
    "net.context": 128,
}


def test_a_gpu_works_the_loss_out_at_once_and_a_cpu_in_its_caches(
    gpu: SimulatedGPU, planned_stages: Callable[..., Any]
) -> None:
    for device in ("cuda", "cpu"):
        given = {"training.device": device, "memory.flops_per_byte": 4096}
        config, (*_, convolution, recurrent) = planned_stages("speech", **PAPERS, **given)
        for spec in (convolution, recurrent):
            plan = fit_stage(config, spec, torch.device(device))
            assert plan is not None
            assert plan.whole
            targets = spec.build_objective(config, torch.device("meta")).targets_at_once(plan.loss_room, 12)
            assert (targets >= 8 * 127) == plan.at_once == (device == "cuda")


def test_a_step_is_few_kernels_one_copy_and_hardly_a_wait(
    gpu: SimulatedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_cases, "WAVES", 10 * gpu_cases.WAVES)
    seen: dict[int, list[Counts]] = {1: [], 2: []}
    stop = StopFlag()

    def note(event: Event) -> None:
        # The first step is told of at once, the others when the scores of so many have been read.
        if isinstance(event, StepDone) and event.step in (1, READ_AT_ONCE + 1):
            seen[event.stage].append(replace(gpu.counts))
        if len(seen[2]) == 2:
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run_case(CASE, "cuda", tmp_path, note, stop, **{"training.batch_size": 2})
    for before, after in seen.values():
        per_step = [
            (getattr(after, name) - getattr(before, name)) / READ_AT_ONCE
            for name in ("kernels", "to_device", "to_host", "waits")
        ]
        kernels, to_device, to_host, waits = per_step
        assert 20 < kernels <= KERNELS
        assert to_device == 1
        assert 0 < to_device + to_host <= COPIES
        assert 0 < waits <= WAITS


def test_a_loss_that_is_no_number_is_found_before_anything_is_saved(
    gpu: SimulatedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, train = StopFlag(), StageTrainer.train
    steps = itertools.count(1)

    def asked_after_three(trainer: StageTrainer, *args: Any) -> Total:
        score = train(trainer, *args)
        if next(steps) == 3:
            stop.reason = "the test"
        return score

    monkeypatch.setattr(StageTrainer, "train", asked_after_three)
    with pytest.raises(TrainingError, match="became nan"):
        run_case(CASE, "cuda", tmp_path, silent, stop, **{"training.lr": 1e30, "training.batch_size": 2})
    assert stop.reason
    assert not list(tmp_path.rglob("checkpoint.safetensors"))

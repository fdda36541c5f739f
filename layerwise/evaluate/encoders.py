"""Modules to be tested, in host memory, and what they make of the samples that a probe asks about."""

from pathlib import Path

import torch

from layerwise.config import Config
from layerwise.errors import BudgetError
from layerwise.evaluate.feature_rows import FeatureRows
from layerwise.evaluate.passed import passed_features
from layerwise.evaluate.question import Question
from layerwise.memory.allocator import meter_for
from layerwise.memory.device import cap, find_device, release, why_out_of_memory
from layerwise.memory.meter import uncounted
from layerwise.nets.module import Module
from layerwise.stop import StopFlag
from layerwise.training.checkpoint import Arrays, load_weights
from layerwise.training.plan import StagePlan

SHORTEST_PIECE = 64
"""Frames of a sequence, or rows of a picture, below which pieces are not made smaller."""


def untrained_modules(config: Config, plans: list[StagePlan]) -> list[Module]:
    """With the weights that training begins with."""
    with uncounted():
        return [plan.build_module(config.training.seed, torch.device("cpu")).eval() for plan in plans]


def trained_modules(config: Config, plans: list[StagePlan], weights: Arrays) -> list[Module]:
    """weights: of all their layers, by the names that these have in the whole network; others are passed over."""
    modules = untrained_modules(config, plans)
    with uncounted():
        for module in modules:
            load_weights(module, {name: weights[name] for name in module.state_dict()})
    return modules


def features_under_budget(
    config: Config, question: Question, modules: list[Module], folder: Path, stop: StopFlag
) -> tuple[list[FeatureRows], int]:
    """Features of each module, in files in the folder, and the bytes on the device that they took.

    Raises BudgetError where --gpu-mem does not hold even short pieces.
    """
    device, budget, data = find_device(config.training.device), config.memory.gpu_mem, question.data
    cap(device, budget)
    piece = config.training.batch_size * (config.data.window if data.columns == 1 else int(data.lengths[0])) // 2
    while True:
        meter = meter_for(device, budget)
        files = [FeatureRows(folder) for _ in modules]
        try:
            with meter:
                passed_features(modules, data, question.samples, piece, question.per_frame, files, device, stop)
            return files, meter.peak
        except (BudgetError, RuntimeError) as error:
            reason = why_out_of_memory(error)
        if piece <= SHORTEST_PIECE * data.columns:
            raise BudgetError(
                f"The run's --gpu-mem of {budget} bytes cannot hold the probe: {reason} Start the run again with a larger "
                "--gpu-mem, which changes nothing else, and probe then."
            )
        piece //= 2
        release(device)

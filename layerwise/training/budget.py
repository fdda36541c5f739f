"""Refuses, before anything is trained, a budget that a stage cannot be trained or cached in."""

import numpy as np
import torch

from layerwise.config import Config
from layerwise.data.batches import Batch
from layerwise.errors import BudgetError
from layerwise.memory.device import autocast, on_device
from layerwise.memory.estimate import predicted_peak
from layerwise.training.caching import caching_piece
from layerwise.training.plan import StagePlan
from layerwise.training.stage import build_optimizer, train_step


def check_budget(config: Config, plans: list[StagePlan], device: torch.device) -> None:
    """Raises BudgetError that names the stage, what it needs and what to change."""
    budget = config.memory.gpu_mem
    if budget is None:
        return
    peaks = [max(training_peak(config, plan, device), caching_peak(config, plan, device)) for plan in plans]
    largest = max(range(len(peaks)), key=peaks.__getitem__)
    if peaks[largest] > budget:
        finer = ", or cut into more --stages" if len(plans) < len(plans[0].network.layers) else ""
        raise BudgetError(
            f"--gpu-mem {budget / 1e6:g} MB is too small: stage {largest + 1} needs {peaks[largest] / 1e6:.1f} MB at batch "
            f"size {config.training.batch_size}. Give at least that, or lower --batch-size, data.window or net.width{finer}."
        )


def training_peak(config: Config, plan: StagePlan, device: torch.device) -> int:
    """Predicted bytes of the training pass of a stage, at full windows."""

    def two_steps() -> None:
        module = plan.build_module(config.training.seed, device)
        objective = plan.build_objective(config, device)
        optimizer = build_optimizer(module, objective, config.training.lr)
        size = config.training.batch_size
        # The optimizer's state appears at the end of the first step, so the second one stands higher; and as in training,
        # the score of a step lives until that of the next one takes its place.
        score = None
        for _ in range(2):
            frames = torch.zeros(size, plan.window.frames, *plan.frame_shape, device="meta")
            batch = Batch(frames, np.full(size, plan.window.frames))
            rng = np.random.default_rng(0)
            score = train_step(module, objective, optimizer, batch, plan, rng, device, config.training.precision)
        del score

    return predicted_peak(two_steps, device)


def caching_peak(config: Config, plan: StagePlan, device: torch.device) -> int:
    """Predicted bytes of the caching pass of a stage: of a long sample that is streamed, or of short ones with padding."""
    piece = caching_piece(plan, config)
    cached = getattr(torch, config.cache.dtype)
    stored = torch.float32 if plan.stage == 1 else cached

    def read(samples: int, frames: int) -> torch.Tensor:
        return on_device(torch.zeros(samples, frames, *plan.frame_shape, dtype=stored, device="meta"), device)

    def stream() -> None:
        module = plan.build_module(config.training.seed, device)
        states = None
        with torch.no_grad(), autocast(device, config.training.precision):
            # How much input a layer carries over depends on where a piece ends within its stride: every place once.
            pieces = 2 + max(layer.stride for layer in module.layers.values())
            for last in [False] * pieces + [True]:
                frames = read(1, piece)
                outputs, states = module.push(frames, states, last)
                del frames
                outputs.to(cached).isfinite().all()
                del outputs

    def pad() -> None:
        module = plan.build_module(config.training.seed, device)
        lengths = np.array([piece - piece // 2, max(piece // 2 - 1, 0)])
        with torch.no_grad(), autocast(device, config.training.precision):
            _, outputs = module(read(2, int(lengths[0])), lengths)
            outputs.to(cached).isfinite().all()

    return max(predicted_peak(stream, device), predicted_peak(pad, device))

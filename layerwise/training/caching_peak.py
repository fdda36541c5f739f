"""What the caching pass of a stage, and recomputing its input, take at their peak: both are rehearsed on fake tensors."""

import math

import numpy as np
import torch

from layerwise.cache.stored import STORED
from layerwise.config import Config
from layerwise.memory.device import autocast, on_device
from layerwise.memory.estimate import DEVICE, rehearse
from layerwise.memory.meter import Meter
from layerwise.nets.module import Module
from layerwise.training.plan import StagePlan
from layerwise.training.remembered import remembered

REHEARSED_STEPS = 32
"""Frames of a recurrent layer in the caching pass."""

Below = tuple[StagePlan, ...]
"""The stages whose outputs are recomputed, lowest first."""


@remembered
def caching_peak(config: Config, plan: StagePlan, piece: int) -> int:
    """Predicted bytes of the caching pass of a stage: of a long sample that is streamed, or of short ones with padding."""
    module = plan.build_module(config.training.seed, torch.device("meta"))
    *below, last = module.layers.values()
    if not last.recurrent or module.out_length(piece) <= 2 * REHEARSED_STEPS:
        return _rehearsed_caching(config, plan, piece, len(module.layers))
    # A recurrent layer takes its time for every frame, fake ones too, and the same room: two short pieces give the line
    # that a long one lies on, and the layers below it are rehearsed at full length.
    short = -(-REHEARSED_STEPS * piece // int(module.out_length(piece)))
    first, second = (_rehearsed_caching(config, plan, n * short, len(module.layers)) for n in (1, 2))
    whole = first + math.ceil((second - first) * (piece - short) / short)
    return max(whole, _rehearsed_caching(config, plan, piece, len(below)) if below else 0)


def _rehearsed_caching(config: Config, plan: StagePlan, piece: int, layers: int) -> int:
    """Of the first layers of a stage."""
    cached = STORED[config.cache.dtype].tensor
    stored = torch.float32 if plan.stage == 1 else cached

    def read(samples: int, frames: int) -> torch.Tensor:
        return on_device(torch.zeros(samples, frames, *plan.frame_shape, dtype=stored, device="meta"), DEVICE)

    def build() -> Module:
        module = plan.build_module(config.training.seed, DEVICE).eval()
        return Module({int(name): layer for name, layer in list(module.layers.items())[:layers]})

    def stream(_: Meter) -> None:
        module, states = build(), None
        with torch.no_grad(), autocast(DEVICE, config.training.precision):
            # How much input a layer carries over depends on where a piece ends within its stride: every place once.
            pieces = 2 + max(layer.stride for layer in module.layers.values())
            for last in [False] * pieces + [True]:
                frames = read(1, piece)
                outputs, states = module.push(frames, states, last)
                del frames
                outputs.to(cached).isfinite().all()
                del outputs

    def pad(_: Meter) -> None:
        module = build()
        lengths = np.array([piece - piece // 2, max(piece // 2 - 1, 0)])
        if module.out_length(lengths[0]) < 1:
            return  # no two samples are that short
        with torch.no_grad(), autocast(DEVICE, config.training.precision):
            outputs = module(read(2, int(lengths[0])), lengths)[1]
            outputs.to(cached).isfinite().all()

    return max(rehearse(stream).peak + _carried_more(plan, layers), rehearse(pad).peak)


def _carried_more(plan: StagePlan, layers: int) -> int:
    """Bytes by which what layers carry over may exceed what they carried in the rehearsal.

    With strides above each other the places where pieces end repeat only after their product. A layer then has at most
    as many frames more as its stride, in its input and in the copy that is joined to it, and puts one more out.
    """
    module = plan.build_module(0, torch.device("meta"))
    built = list(module.layers.values())[:layers]
    if sum(layer.stride > 1 for layer in built) < 2:
        return 0
    x, more = torch.empty(1, plan.window.frames, *plan.frame_shape, device="meta"), 0
    for layer in built:
        before = x[0, 0].numel()
        x = layer(x)
        more += 4 * (2 * layer.stride * before + x[0, 0].numel())
    return more


def recomputing_peak(config: Config, below: Below, windows: int, frames: int) -> int:
    """Predicted bytes of passing windows up through the stages below, each alone on the device; 0 where there are none.

    windows: on the device at once; frames: of the outcome.
    """
    peak = 0
    firsts, stops = 0, frames
    for plan in reversed(below):
        firsts, stops = plan.build_module(0, torch.device("meta")).inputs_of(firsts, stops)
        peak = max(peak, _passing_peak(config, plan, windows, stops - firsts))
    return peak


@remembered
def _passing_peak(config: Config, plan: StagePlan, windows: int, frames: int) -> int:
    """Of windows of `frames` input frames through one stage, at the beginning of their samples, where they are masked."""
    rounded = STORED[config.cache.dtype].tensor
    stored = torch.float32 if plan.stage == 1 else rounded

    def work(_: Meter) -> None:
        module = plan.build_module(config.training.seed, DEVICE).eval()
        firsts, lengths = np.full(windows, -module.inputs_of(0, 1)[1]), np.full(windows, 2 * frames)
        with torch.no_grad(), autocast(DEVICE, config.training.precision):
            x = on_device(torch.zeros(windows, frames, *plan.frame_shape, dtype=stored, device="meta"), DEVICE)
            outputs = module.window(x, firsts, lengths)[0]
            del x
            outputs.to(rounded).isfinite().all()

    return rehearse(work).peak

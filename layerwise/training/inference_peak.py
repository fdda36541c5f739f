"""Predicts what a stage takes at its peak where it is not trained: in the caching pass, and while outputs are recomputed.

As in `training_peak`, the passes themselves are rehearsed on fake tensors; of many like pieces only the first.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_iter

from layerwise.cache.dtypes import STORED, largest
from layerwise.config import Config
from layerwise.data.batches import gathered
from layerwise.memory.device import autocast, brought, on_device
from layerwise.memory.meter import REHEARSED_ON, RehearsalMeter, rehearsal
from layerwise.memory.reserved import Allocations, Segments
from layerwise.nets.module import Module
from layerwise.nets.network import memoised_per
from layerwise.training.overlapped import contiguous
from layerwise.training.rehearsed_input import resident_rows, stored_input
from layerwise.training.spec import StageSpec

REHEARSED_STEPS = 16
"""Frames of a recurrent layer in the caching pass."""

Below = tuple[StageSpec, ...]
"""The stages whose outputs are recomputed, lowest first."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What passing frames through a module takes."""

    peak: int
    """Most bytes that tensors request."""
    allocations: tuple[Allocations, ...]
    """Of what is rehearsed by itself."""
    more: int = 0
    """Bytes that the first of them may take on top."""

    def bytes(self, segments: Segments | None) -> int:
        """Of the peak, as they count on the device."""
        return self.peak if segments is None else self.reserved(segments, 1)

    def reserved(self, segments: Segments, times: float) -> int:
        """Where as many frames pass at once, times as many as were rehearsed."""
        first, *others = (each.scaled(times).least(segments) for each in self.allocations)
        return max([first + self.more, *others])


@memoised_per(StageSpec)
def caching_peak(
    config: Config,
    spec: StageSpec,
    piece: int,
    segments: Segments | None = None,
    overlapped: bool = False,
    resident: int = 0,
) -> int:
    """Predicted bytes of the caching pass of a stage: of a long sample that is streamed, or of short ones side by side.

    segments: how the device reserves memory, None: what tensors request is what counts; overlapped, resident: as in a plan.
    """
    module = spec.shapes
    *below, last = module.layers.values()
    shortest, longest = int(spec.lengths.min()), int(spec.lengths.max())
    streamed = longest > piece
    rehearsed = partial(
        _rehearsed_caching,
        config,
        spec,
        padded=shortest < min(longest, piece),
        overlapped=overlapped,
        resident=resident,
    )
    fitting = piece // shortest
    # One sample, two for all numbers between, and as many as there can be; none is longer than the longest.
    counts = ((1, piece), (2, -(-piece // 2)), (fitting, piece // max(fitting, 1)))
    beside = tuple(sorted({(samples, min(frames, longest)) for samples, frames in counts})) if fitting else ()
    if not last.recurrent or module.out_length(piece) <= 2 * REHEARSED_STEPS:
        return rehearsed(piece, len(module.layers), beside, streamed).bytes(segments)

    def on_the_line(samples: int, streamed: bool) -> int:
        """A recurrent layer takes its time for every frame, fake ones too, and the same room: two short pieces give the line
        that a long one lies on, and the layers below it are rehearsed at full length."""
        first, second = (
            rehearsed(n * short, len(module.layers), () if streamed else ((samples, n * short),), streamed)
            for n in (1, 2)
        )
        if segments is None:
            return first.peak + math.ceil((second.peak - first.peak) * (piece / samples - short) / short)
        return second.reserved(segments, piece / (2 * samples * short))

    short = -(-REHEARSED_STEPS * piece // int(module.out_length(piece)))
    whole = on_the_line(1, streamed=True) if streamed else 0
    if fitting:
        whole = max(whole, on_the_line(max(min(fitting, piece // short), 2), streamed=False))
    if not below:
        return whole
    return max(whole, rehearsed(piece, len(below), beside, streamed).bytes(segments))


@memoised_per(StageSpec)
def _rehearsed_caching(
    config: Config,
    spec: StageSpec,
    piece: int,
    layers: int,
    beside: tuple[tuple[int, int], ...],
    streamed: bool,
    *,
    padded: bool,
    overlapped: bool,
    resident: int,
) -> _Pass:
    """Of the first layers of a stage: of a sample that is streamed, and of samples side by side.

    beside: so many of so many frames; streamed: whether some are; padded: whether some of the others are shorter than their
    neighbours.
    """
    caching = _Caching(config, spec, layers, overlapped, resident)
    passes, more = [caching.side_by_side(samples, frames, padded) for samples, frames in beside], 0
    if streamed:
        passes, more = [caching.streamed(piece), *passes], _carried_more(spec, layers)
    peak = max([passes[0].peak + more, *(each.peak for each in passes)])
    return _Pass(peak, tuple(each.allocations for each in passes), more)


Way = Callable[[torch.Tensor], torch.Tensor]
"""From a piece of the input to what comes out."""


@dataclass(frozen=True, slots=True)
class _Caching:
    """The caching pass of the first layers of a stage."""

    config: Config
    spec: StageSpec
    layers: int
    overlapped: bool
    resident: int

    def streamed(self, piece: int) -> RehearsalMeter:
        """A sample in pieces of so many frames."""
        with rehearsal() as meter:
            stream, rows = _Stream(self._build()), resident_rows(self.config, self.spec, self.resident)
            meter.allocations.begin_step()
            self._go_through(stream.ways(), 1, piece, rows)
        return meter

    def side_by_side(self, samples: int, frames: int, padded: bool) -> RehearsalMeter:
        """So many samples of so many frames, each pass by itself."""
        lengths = np.full(samples, 0 if padded else frames)  # 0: the outputs of every layer are masked
        with rehearsal() as meter:
            module, rows = self._build(), resident_rows(self.config, self.spec, self.resident)
            meter.allocations.begin_step()
            if module.out_length(frames) >= 1:  # otherwise no samples are that short
                pieces = 2 if self.overlapped else 1
                self._go_through([lambda x: module(x, lengths)[1]] * pieces, samples, frames, rows)
        return meter

    def _build(self) -> Module:
        module = self.spec.build_module(self.config.training.seed, REHEARSED_ON).eval()
        return Module({int(name): layer for name, layer in list(module.layers.items())[: self.layers]})

    def _go_through(self, ways: Iterable[Way], samples: int, frames: int, rows: torch.Tensor | None) -> None:
        """Pieces, each in its way. Overlapped, the next one is there meanwhile, and what the one before has made."""
        cached = STORED[self.config.cache.dtype].tensor
        coming = leaving = None
        with torch.no_grad(), autocast(REHEARSED_ON, self.config.training.precision):
            for way in ways:
                there = self._sent(samples, frames) if coming is None else coming
                coming = self._sent(samples, frames) if self.overlapped else None
                x = gathered(there, rows).float()
                del there
                outputs = way(x)
                del x
                if self.overlapped:
                    largest(outputs)
                    leaving = contiguous(outputs, cached)
                else:
                    largest(outputs.to(cached))
                del outputs
            del leaving

    def _sent(self, samples: int, frames: int) -> torch.Tensor:
        return brought(stored_input(self.config, self.spec, samples, frames, self.resident), REHEARSED_ON)


class _Stream:
    """A sample that goes through a module piece by piece."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._states: list[Any] | None = None
        """What each layer carries over to the next piece."""

    def ways(self) -> Iterator[Way]:
        """How much input a layer carries over depends on where a piece ends within its stride: every place once.

        Where it carries as much as before, what follows takes the same room. A last piece differs where something is padded.
        """
        layers, carried = [*self._module.layers.values()], set[tuple[int, ...]]()
        padded = any(layer.padding for layer in layers)
        for _ in range(2 + max(layer.stride for layer in layers)):
            yield self._push
            yield from [self._end] * padded
            now = tuple(t.untyped_storage().nbytes() for t in tree_iter(self._states) if isinstance(t, torch.Tensor))
            if now in carried:
                break
            carried.add(now)

    def _push(self, x: torch.Tensor) -> torch.Tensor:
        outputs, self._states = self._module.push(x, self._states, False)
        return outputs

    def _end(self, x: torch.Tensor) -> torch.Tensor:
        return self._module.push(x, self._states, True)[0]


def _carried_more(spec: StageSpec, layers: int) -> int:
    """Bytes by which what layers carry over may exceed what they carried in the rehearsal.

    With strides above each other the places where pieces end repeat only after their product. A layer then has at most
    as many frames more as its stride, in its input and in the copy that is joined to it, and puts one more out.
    """
    built = list(spec.shapes.layers.values())[:layers]
    if sum(layer.stride > 1 for layer in built) < 2:
        return 0
    x, more = torch.empty(1, spec.window.frames, *spec.frame_shape, device="meta"), 0
    for layer in built:
        before = x[0, 0].numel()
        x = layer(x)
        more += 4 * (2 * layer.stride * before + x[0, 0].numel())
    return more


def recomputing_peak(config: Config, below: Below, windows: int, frames: int, segments: Segments | None = None) -> int:
    """Predicted bytes of passing windows up through the stages below, each alone on the device; 0 where there are none.

    windows: on the device at once; frames: of the outcome; segments: as in `caching_peak`.
    """
    peak = 0
    firsts, stops = 0, frames
    for spec in reversed(below):
        firsts, stops = spec.shapes.inputs_of(firsts, stops)
        peak = max(peak, _passing(config, spec, windows, stops - firsts).bytes(segments))
    return peak


@memoised_per(StageSpec)
def _passing(config: Config, spec: StageSpec, windows: int, frames: int) -> _Pass:
    """Of windows of `frames` input frames through one stage, at the beginning of their samples, where they are masked."""
    with rehearsal() as meter:
        module = spec.build_module(config.training.seed, REHEARSED_ON).eval()
        meter.allocations.begin_step()
        firsts, lengths = np.full(windows, -module.inputs_of(0, 1)[1]), np.full(windows, 2 * frames)
        with torch.no_grad(), autocast(REHEARSED_ON, config.training.precision):
            x = on_device(stored_input(config, spec, windows, frames), REHEARSED_ON)
            outputs = module.window(x, firsts, lengths)[0]
            del x
            largest(outputs.to(STORED[config.cache.dtype].tensor))
    return _Pass(meter.peak, (meter.allocations,))

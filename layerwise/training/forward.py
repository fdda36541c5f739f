"""Runs trained stages forward over whole samples: one for its cache, or all of them for probes and extraction.

At most `piece` input frames are on the device at a time. A sample longer than that is streamed through the module, whose
layers carry their state, and gives what one pass would give. Where several stages run, one module is on the device at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch.utils._pytree import tree_iter

from layerwise.cache.dtypes import STORED, as_array, largest
from layerwise.config import Config
from layerwise.data.batches import Batch, Group, gathered
from layerwise.data.source import DataSet
from layerwise.errors import TrainingError
from layerwise.memory.device import (
    autocast,
    brought,
    find_device,
    halve_until_it_fits,
    offloaded,
    pack_recurrent_weights,
)
from layerwise.memory.driver import cap
from layerwise.memory.meter import AnyMeter, meter_for, metered, uncounted
from layerwise.nets.module import Module
from layerwise.nets.network import copied
from layerwise.stop import StopFlag
from layerwise.training.checkpoint import Arrays, load_weights
from layerwise.training.context import RunContext
from layerwise.training.loader import Loader
from layerwise.training.spec import StageSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a stage hands its outputs to what stands above it."""

    precision: Literal["float32", "bfloat16", "float16"]
    """Of the pass that works them out."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] | None
    """Of the cache that they were trained to be read from; None where nothing lay between, so nothing is rounded."""

    @staticmethod
    def of(config: Config) -> "OutputFormat":
        """Of a stage that was trained with these options. int8 is not rounded: its scales are those of 1000 rows."""
        return OutputFormat(config.training.precision, config.cache.dtype)


@dataclass(frozen=True, slots=True)
class InferenceStage:
    """A stage that is trained no more."""

    stage: int
    module: Module
    output_format: OutputFormat
    resident: bool = False
    """Whether the module stays on the device; otherwise it lies in host memory, and a copy of it comes over when it runs."""

    def on_device(self, device: torch.device) -> Module:
        """The module, to be let go of after use."""
        return self.module if self.resident else copied(self.module, device)

    def as_stored(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rounded as a cache would have rounded them. Raises TrainingError where its dtype cannot hold them."""
        dtype = self.output_format.dtype
        stored = outputs if dtype is None else outputs.to(STORED[dtype].tensor)
        if dtype is not None and not torch.isfinite(largest(stored)):
            self.refuse_unstorable(largest(outputs))
        return stored

    def refuse_unstorable(self, most: torch.Tensor) -> None:
        """Raises TrainingError where the dtype of the cache cannot hold the largest output; a scalar."""
        dtype = self.output_format.dtype
        if dtype is not None and not torch.isfinite(most.to(STORED[dtype].tensor)):
            raise TrainingError(
                f"An output of stage {self.stage} of {most.item():.3g} does not fit into {dtype}; start again "
                f"with --from-stage {self.stage} --cache-dtype bfloat16."
            )


def forward_all(
    stages: Sequence[InferenceStage],
    loader: Loader,
    groups: Sequence[Group],
    keep: Callable[[int, int, torch.Tensor], T],
    context: RunContext,
) -> Iterator[tuple[int, T, bool]]:
    """Passes the loader's groups through all stages, lowest first; see `group_renderings`.

    keep(number, rendering, frames) is called for each stage, counted from 0, and each piece of each rendering with what the
    stage hands over: frames (L, *frame shape) on the device. Gives the rendering, what `keep` made of the last stage's frames,
    and whether this was the rendering's last piece. Raises TrainingError where a dtype cannot hold an output.
    """

    def keep_each(number: int, renderings: Sequence[int], frames: torch.Tensor, lengths: np.ndarray) -> list[T]:
        each = zip(renderings, frames, lengths.tolist(), strict=True)
        return [keep(number, rendering, outputs[:length]) for rendering, outputs, length in each]

    for renderings, kept, last in forward_pieces(stages, loader, groups, keep_each, context):
        for rendering, of_rendering in zip(renderings, kept, strict=True):
            yield rendering, of_rendering, last


def as_they_come(pieces: Iterator[Batch]) -> Iterator[Batch]:
    """Changes nothing."""
    return pieces


def forward_pieces(
    stages: Sequence[InferenceStage],
    loader: Loader,
    groups: Sequence[Group],
    keep: Callable[[int, Sequence[int], torch.Tensor, np.ndarray], T],
    context: RunContext,
    sent: Callable[[Iterator[Batch]], Iterator[Batch]] = as_they_come,
) -> Iterator[tuple[Sequence[int], T, bool]]:
    """The same piece by piece, with all renderings that lie side by side in it.

    keep(number, renderings, frames, lengths) is called for each stage and piece: frames (B, L, *frame shape) on the device,
    int64 [B] real lengths. sent: may send the pieces to the device ahead.
    """
    device, states = context.device, None
    resident = [stage.module for stage in stages if stage.resident]

    @contextlib.contextmanager
    def away() -> Iterator[None]:
        """The device is free of the stages and of the state that they carry."""
        carried = (value for value in tree_iter(states) if isinstance(value, torch.Tensor))
        tensors = (tensor for module in resident for tensor in (*module.parameters(), *module.buffers()))
        with offloaded([*tensors, *carried], device):
            yield
        for module in resident:
            pack_recurrent_weights(module)

    pieces = sent(loader.pieces(groups, away))
    for group in groups:
        states = [None] * len(stages) if group.streamed else None
        look = _should_meter(context.meter, group)
        for start in group.starts:
            batch, last = next(pieces), group.is_last(start)
            renderings = range(group.first, group.stop) if batch.renderings is None else batch.renderings.tolist()
            if not renderings:
                continue
            passed = _forward(stages, batch, states, last, device)
            del batch  # what of it is on the device is to be let go of on the way
            with metered(look), torch.no_grad():
                for number, frames, lengths in passed:
                    kept = keep(number, renderings, frames, lengths)
                    del frames
            yield renderings, kept, last
            del kept


def within_budget(work: Callable[[int, RunContext], T], config: Config, data: DataSet, stop: StopFlag) -> tuple[T, int]:
    """What work(piece, context) gives, which passes samples of the data through stages, and the most bytes on the device.

    Where the budget does not hold it, `work` is called again with half the piece. Raises BudgetError where pieces of
    SHORTEST do not fit either.
    """
    device, budget, peak = find_device(config.training.device), config.memory.gpu_mem, 0
    cap(device, budget)

    def attempt(piece: int) -> T:
        nonlocal peak
        meter = meter_for(device, budget)
        try:
            with meter:
                return work(piece, RunContext(device, meter, stop=stop))
        finally:
            # The meter counts what it refuses, too.
            peak = max(peak, meter.peak if budget is None else min(meter.peak, budget))

    result = halve_until_it_fits(attempt, longest_piece_of_samples(config, data), SHORTEST * data.columns, device)
    return result, peak


def _forward(
    stages: Sequence[InferenceStage], batch: Batch, states: list[Any] | None, last: bool, device: torch.device
) -> Iterator[tuple[int, torch.Tensor, np.ndarray]]:
    """Each stage's number, from 0, and what it hands over: frames (B, L, *frame shape) on the device, int64 [B] real lengths.

    states: one for each stage where the batch is the next piece of one sample, None before its first and brought up to
    date here; last: whether it ends the sample. None where samples lie side by side.
    """
    there, lengths = batch.frames, batch.lengths
    if there.device.type != "cuda":
        there = brought(there, device)
    frames = gathered(there, batch.rows).float()
    del there, batch
    for number, stage in enumerate(stages):
        module = stage.on_device(device)
        with autocast(device, stage.output_format.precision):
            if states is None:
                frames = module(frames.float(), lengths)[1]
                lengths = module.out_length(lengths)
            else:
                frames, states[number] = module.push(frames.float(), states[number], last)
                lengths = np.array([frames.shape[1]])
            del module
            frames = stage.as_stored(frames)
        yield number, frames, lengths


def _should_meter(meter: AnyMeter, group: Group) -> bool:
    """Whether to meter the pass of this group, see `Meter.should_meter`."""
    if group.streamed:
        return meter.should_meter("streamed", group.longest)
    return meter.should_meter("side by side", (group.stop - group.first) * group.longest, group.padded)


def to_host(rows: torch.Tensor) -> np.ndarray:
    """A copy that does not count on the device, as `as_array` gives it; on a CPU, too, it shares no memory with the rows."""
    with uncounted():
        return as_array(rows.to("cpu", copy=True, memory_format=torch.contiguous_format))


def random_stages(
    specs: Sequence[StageSpec], output_formats: Sequence[OutputFormat], seed: int
) -> list[InferenceStage]:
    """With the weights that training with this seed begins with; their host memory does not count for the device."""
    with uncounted():
        modules = [spec.build_module(seed, torch.device("cpu")).eval() for spec in specs]
    return [
        InferenceStage(spec.stage, module, output_format)
        for spec, module, output_format in zip(specs, modules, output_formats, strict=True)
    ]


def trained_stages(
    specs: Sequence[StageSpec], output_formats: Sequence[OutputFormat], weights: Arrays
) -> list[InferenceStage]:
    """weights: of all their layers, by the names that these have in the whole network; others are passed over."""
    stages = random_stages(specs, output_formats, 0)
    with uncounted():
        for stage in stages:
            load_weights(stage.module, {name: weights[name] for name in stage.module.state_dict()})
    return stages


SHORTEST = 64
"""Frames of a sequence, or rows of a picture, below which pieces are not made smaller where memory runs out."""


def longest_piece(spec: StageSpec, config: Config) -> int:
    """Input frames that are on the device at once where the budget does not ask for less: half a training batch.

    A streamed convolution holds its input twice, so half keeps the caching pass below the training pass.
    """
    return max(config.training.batch_size * spec.window.frames // 2, 1)


def shortest_piece(spec: StageSpec, config: Config) -> int:
    """Below this, pieces would cost more time than they save room: a row of a picture, or SHORTEST frames."""
    return min(longest_piece(spec, config), spec.window.columns if spec.window.columns > 1 else SHORTEST)


def longest_piece_of_samples(config: Config, data: DataSet) -> int:
    """The same for samples that pass through all stages from the data on: half a training batch of windows or samples."""
    per_sample = config.data.window if config.data.frames == "steps" else int(data.lengths[0])
    return max(config.training.batch_size * per_sample // 2, 1)

"""Runs trained stages forward: all of them over new samples, or one of them over its whole input, into the cache writer.

At most `piece` input frames are on the device at a time. A sample longer than that is streamed through the module, whose
layers carry their state, and gives what one pass would give. Where several stages run, one module is on the device at a time.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_iter

from layerwise.cache import CacheWriter, Layout
from layerwise.cache.dtypes import STORED, as_array
from layerwise.config import Config
from layerwise.data.batches import Batch, Group, group_renderings
from layerwise.data.source import DataSet
from layerwise.errors import TrainingError
from layerwise.events import CachingProgress
from layerwise.memory.device import autocast, offloaded, on_device, pack_recurrent_weights
from layerwise.memory.meter import AnyMeter, metered, uncounted
from layerwise.nets.module import Module
from layerwise.nets.network import copied
from layerwise.training.checkpoint import Arrays, load_weights
from layerwise.training.context import RunContext
from layerwise.training.loader import Loader
from layerwise.training.spec import StageSpec


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a stage hands its outputs to what stands above it."""

    precision: str
    """Of the pass that works them out."""
    dtype: str | None
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
    """In host memory."""
    handing: OutputFormat

    def as_stored(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rounded as a cache would have rounded them. Raises TrainingError where its dtype cannot hold them."""
        return outputs if self.handing.dtype is None else rounded(outputs, self.handing.dtype, self.stage)


def forward_stages(
    stages: Sequence[InferenceStage], batch: Batch, states: list[Any] | None, last: bool, device: torch.device
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """What each stage hands over, lowest first: frames (B, L, *frame shape) on the device, and int64 [B] real lengths.

    states: one for each stage where the batch is the next piece of one sample, None before its first and brought up to
    date here; last: whether it ends the sample. None where samples lie side by side.
    """
    frames, lengths = on_device(batch.frames, device), batch.lengths
    for number, stage in enumerate(stages):
        module = copied(stage.module, device)
        with torch.no_grad(), autocast(device, stage.handing.precision):
            if states is None:
                frames = module(frames.float(), lengths)[1]
                lengths = module.out_length(lengths)
            else:
                frames, states[number] = module.push(frames.float(), states[number], last)
                lengths = np.array([frames.shape[1]])
            del module
            frames = stage.as_stored(frames)
        yield frames, lengths


def random_stages(specs: Sequence[StageSpec], handings: Sequence[OutputFormat], seed: int) -> list[InferenceStage]:
    """With the weights that training with this seed begins with; their host memory does not count for the device."""
    with uncounted():
        modules = [spec.build_module(seed, torch.device("cpu")).eval() for spec in specs]
    return [
        InferenceStage(spec.stage, module, handing)
        for spec, module, handing in zip(specs, modules, handings, strict=True)
    ]


def trained_stages(
    specs: Sequence[StageSpec], handings: Sequence[OutputFormat], weights: Arrays
) -> list[InferenceStage]:
    """weights: of all their layers, by the names that these have in the whole network; others are passed over."""
    stages = random_stages(specs, handings, 0)
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


def cache_outputs(
    module: Module, loader: Loader, writer: CacheWriter, piece: int, precision: str, context: RunContext
) -> None:
    """Writes what the writer lacks. Raises Interrupted between two pieces; what is written so far stays.

    Writers that share a cache go through the groups of the whole of it, each through those that its rows are in: the values
    are those of one writer to the bit.
    """
    layout = writer.layout
    rows_done, rows_stop = writer.rows_done, writer.rows_stop
    groups = group_renderings(np.repeat(loader.lengths, loader.views), piece) if rows_done < rows_stop else []
    missing = [
        group for group in groups if layout.offsets[group.stop] > rows_done and layout.offsets[group.first] < rows_stop
    ]
    row = int(layout.offsets[missing[0].first]) if missing else 0
    module.eval()
    with torch.no_grad():
        for stored in _stored_outputs(module, loader, missing, precision, layout, context):
            writer.write(stored[max(rows_done - row, 0) : max(rows_stop - row, 0)])
            row += len(stored)
            meter = context.meter
            context.notify(CachingProgress(layout.stage, min(row, rows_stop), rows_stop, meter.live, meter.peak))
            context.stop.raise_if_set(f"in the cache of stage {layout.stage}, after row {row}")


def _stored_outputs(
    module: Module,
    loader: Loader,
    groups: list[Group],
    precision: str,
    layout: Layout,
    context: RunContext,
) -> Iterator[np.ndarray]:
    """Rows [n, *frame shape] as they are stored, rendering after rendering; nothing stays on the device between them."""
    device, states = context.device, None

    @contextlib.contextmanager
    def away() -> Iterator[None]:
        carried = (value for value in tree_iter(states) if isinstance(value, torch.Tensor))
        with offloaded([*module.parameters(), *module.buffers(), *carried], device):
            yield
        pack_recurrent_weights(module)

    pieces = loader.pieces(groups, away)
    for group in groups:
        states = None
        look = should_meter_group(context.meter, group)
        for start in group.starts:
            batch = next(pieces)
            with metered(look), autocast(device, precision):
                frames = on_device(batch.frames, device)
                if group.streamed:
                    outputs, states = module.push(frames, states, group.is_last(start))
                    lengths = [outputs.shape[1]]
                else:
                    outputs = module(frames, batch.lengths)[1]
                    lengths = module.out_length(batch.lengths).tolist()
                del frames
                stored = [
                    _as_stored(sample[:length], layout.dtype, layout.stage)
                    for sample, length in zip(outputs, lengths, strict=True)
                ]
                del outputs
            yield from stored


def should_meter_group(meter: AnyMeter, group: Group) -> bool:
    """Whether to meter the pass of this group, see `Meter.should_meter`."""
    if group.streamed:
        return meter.should_meter("streamed", group.longest)
    return meter.should_meter("side by side", (group.stop - group.first) * group.longest, group.padded)


def _as_stored(rows: torch.Tensor, dtype: str, stage: int) -> np.ndarray:
    """Rows on the host as the cache writer takes them. Raises TrainingError where the dtype cannot hold them."""
    # Copied: on a CPU the array would share the tensor's memory and keep it on the device.
    return as_array(rounded(rows, dtype, stage).cpu().contiguous()).copy()


def rounded(rows: torch.Tensor, dtype: str, stage: int) -> torch.Tensor:
    """Outputs of a stage as the writer of a cache of this dtype takes them. Raises TrainingError where it cannot hold them."""
    stored = rows.to(STORED[dtype].tensor)
    if not torch.isfinite(stored).all():
        raise TrainingError(
            f"An output of stage {stage} of {rows.abs().max().item():.3g} does not fit into {dtype}; start again with "
            f"--from-stage {stage} --cache-dtype bfloat16."
        )
    return stored

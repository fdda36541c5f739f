"""The caching pass: the outputs of a trained module for every sample and view, whole, into the cache writer.

At most `piece` input frames are on the device at a time. A sample longer than that is streamed through the module, whose
layers carry their state, and gives what one pass would give.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils._pytree import tree_iter

from layerwise.cache import CacheWriter, Layout
from layerwise.cache.stored import STORED, as_array
from layerwise.config import Config
from layerwise.data.groups import Group, group_renderings
from layerwise.errors import TrainingError
from layerwise.events import CachingProgress, Notify
from layerwise.memory.allocator import AnyMeter
from layerwise.memory.device import autocast, on_device
from layerwise.memory.meter import metered
from layerwise.memory.parking import parked, repack
from layerwise.nets.module import Module
from layerwise.stop import StopFlag
from layerwise.training.feed import Feed
from layerwise.training.plan import StagePlan

SHORTEST = 64
"""Frames of a sequence, or rows of a picture, below which pieces are not made smaller where memory runs out."""


def longest_piece(plan: StagePlan, config: Config) -> int:
    """Input frames that are on the device at once where the budget does not ask for less: half a training batch.

    A streamed convolution holds its input twice, so half keeps the caching pass below the training pass.
    """
    return max(config.training.batch_size * plan.window.frames // 2, 1)


def shortest_piece(plan: StagePlan, config: Config) -> int:
    """Below this, pieces would cost more time than they save room: a row of a picture, or SHORTEST frames."""
    return min(longest_piece(plan, config), plan.window.columns if plan.window.columns > 1 else SHORTEST)


def cache_outputs(
    module: Module,
    feed: Feed,
    writer: CacheWriter,
    piece: int,
    precision: str,
    device: torch.device,
    meter: AnyMeter,
    stop: StopFlag,
    notify: Notify,
) -> None:
    """Writes what the writer lacks. Raises Interrupted between two pieces; what is written so far stays.

    Writers that share a cache go through the groups of the whole of it, each through those that its rows are in: the values
    are those of one writer to the bit.
    """
    layout = writer.layout
    rows_done, rows_stop = writer.rows_done, writer.rows_stop
    groups = group_renderings(np.repeat(feed.lengths, feed.views), piece) if rows_done < rows_stop else []
    missing = [
        group for group in groups if layout.offsets[group.stop] > rows_done and layout.offsets[group.first] < rows_stop
    ]
    row = int(layout.offsets[missing[0].first]) if missing else 0
    module.eval()
    with torch.no_grad():
        for stored in _stored_outputs(module, feed, missing, precision, device, meter, layout):
            writer.write(stored[max(rows_done - row, 0) : max(rows_stop - row, 0)])
            row += len(stored)
            notify(CachingProgress(layout.stage, min(row, rows_stop), rows_stop, meter.live, meter.peak))
            stop.raise_if_set(f"in the cache of stage {layout.stage}, after row {row}")


def _stored_outputs(
    module: Module,
    feed: Feed,
    groups: list[Group],
    precision: str,
    device: torch.device,
    meter: AnyMeter,
    layout: Layout,
) -> Iterator[np.ndarray]:
    """Rows [n, *frame shape] as they are stored, rendering after rendering; nothing stays on the device between them."""
    states = None

    @contextlib.contextmanager
    def away() -> Iterator[None]:
        carried = (value for value in tree_iter(states) if isinstance(value, torch.Tensor))
        with parked([*module.parameters(), *module.buffers(), *carried], device):
            yield
        repack(module)

    pieces = feed.pieces(groups, away)
    for group in groups:
        states = None
        look = looks_at(meter, group)
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


def looks_at(meter: AnyMeter, group: Group) -> bool:
    """Whether to meter the pass of this group, see `Meter.looks`; what a streamed sample carries is seen whole or not."""
    if group.streamed:
        return meter.looks("streamed", group.longest)
    return meter.looks("side by side", (group.stop - group.first) * group.longest, group.padded)


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

"""The input of a stage whose lower stages are not cached: recomputed from the nearest cache below, or from the data.

Windows are recomputed block by block. The inputs of a block are read; each module in between is put on the device alone and
passes all of them on to host memory; then the stage itself comes back and trains on the result. Values are rounded as a cache
would have rounded them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from layerwise.data.batches import Batch, Epoch, Group, at_length, read_ahead
from layerwise.data.source import FrameSource, pixels_apart
from layerwise.memory.device import autocast, halve_until_it_fits, on_device
from layerwise.memory.meter import uncounted
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.nets.module import Module
from layerwise.training.forward import InferenceStage
from layerwise.training.loader import Offload, Prepare, as_read, in_whole_batch, share_of
from layerwise.training.spec import StageSpec

BLOCK_BYTES = 256 * 2**20
"""Host memory of a block: one level of representations of its windows and the next."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows on their way up: frames firsts[b] to firsts[b] + n of samples of lengths[b] frames."""

    frames: torch.Tensor
    """CPU tensor [B, n, *frame shape], zero outside of the samples."""
    firsts: np.ndarray
    lengths: np.ndarray
    real: np.ndarray
    """int64 [B], frames of the outcome that are asked for."""


class RecomputingLoader:
    """Passes what it reads through trained modules."""

    def __init__(
        self,
        source: FrameSource,
        specs: Sequence[StageSpec],
        stages: Sequence[InferenceStage],
        samples: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        """stages: those of `specs`, trained, lowest first; samples: windows on the device at once; ranks: who shares the
        batches; the windows of the others are zeros, and not worked out."""
        self.lengths, self.columns, self.views = specs[-1].output_lengths, source.columns, source.views
        self._source, self._specs, self._stages = source, specs, stages
        self._samples, self._device, self._ranks = samples, device, ranks
        self._frame_by_frame = all(stage.module.frame_by_frame for stage in stages)
        self.pixels_apart = pixels_apart(source) if self._frame_by_frame else 1

    def batches(self, epoch: Epoch, first: int, offloaded: Offload, prepare: Prepare = as_read) -> Iterator[Batch]:
        per_block = max(BLOCK_BYTES // self._bytes(epoch.batch_size, epoch.window.frames), 1)
        for start in range(first, epoch.steps, per_block):
            steps = range(start, min(start + per_block, epoch.steps))
            block = self._block([partial(self._read_windows, epoch, step) for step in steps], offloaded)
            for step, batch in zip(steps, block, strict=True):
                yield prepare(step, in_whole_batch(batch, epoch, step, self, self._ranks))

    def pieces(self, groups: Sequence[Group], offloaded: Offload) -> Iterator[Batch]:
        reads: list[tuple[Group, int]] = []
        held = 0
        for group in groups:
            for start in group.starts:
                taken = self._bytes(group.stop - group.first, min(group.longest, group.piece))
                if reads and held + taken > BLOCK_BYTES:
                    yield from self._pieces(reads, offloaded)
                    reads, held = [], 0
                reads.append((group, start))
                held += taken
        if reads:
            yield from self._pieces(reads, offloaded)

    def _pieces(self, reads: Sequence[tuple[Group, int]], offloaded: Offload) -> Iterator[Batch]:
        block = self._block([partial(self._read_piece, *read) for read in reads], offloaded)
        for (group, _), batch in zip(reads, block, strict=True):
            if not group.streamed:
                with uncounted():  # it waits on the host
                    batch = at_length(batch, group.longest)
            yield batch

    def _block(self, reads: list[partial[Windows]], offloaded: Offload) -> Iterator[Batch]:
        block = list(read_ahead(reads))
        with offloaded():
            for stage in self._stages:
                block = self._passed(stage, block)
        block.reverse()
        while block:  # what is trained on is let go of
            windows = block.pop()
            yield Batch(windows.frames, windows.real)

    def _read_windows(self, epoch: Epoch, step: int) -> Windows:
        share = share_of(epoch, step, self._ranks)
        if not self._frame_by_frame:
            rows = epoch.rows_of(step, share)
            return self._read(epoch.samples[rows], epoch.views[rows], epoch.first_rows[rows], epoch.window.rows)
        batch = epoch.read(self._source, step, share)
        return Windows(batch.frames, np.zeros_like(batch.lengths), batch.lengths, batch.lengths)

    def _read_piece(self, group: Group, start: int) -> Windows:
        samples, views = np.divmod(np.arange(group.first, group.stop), group.views)
        return self._read(samples, views, np.full(len(samples), start), min(group.piece, group.longest - start))

    def _read(self, samples: np.ndarray, views: np.ndarray, starts: np.ndarray, count: int) -> Windows:
        """What `count` frames from each start are made of."""
        real = np.minimum(starts + count, self.lengths[samples]) - starts
        count = int(real.max())
        firsts, stops = starts, starts + count
        for stage in reversed(self._stages):
            firsts, stops = stage.module.inputs_of(firsts, stops)
        lengths = self._source.lengths[samples]
        frames = None
        for row, (sample, view, first, stop, length) in enumerate(
            zip(*(each.tolist() for each in (samples, views, firsts, stops, lengths)), strict=True)
        ):
            inside = slice(max(first, 0), max(min(stop, length), max(first, 0)))
            read = self._source.read(sample, inside.start, inside.stop, view)
            if frames is None:
                frames = torch.zeros(len(samples), stop - first, *read.shape[1:], dtype=read.dtype)
            frames[row, inside.start - first : inside.stop - first] = read
        assert frames is not None
        return Windows(frames, firsts, lengths, real)

    def _passed(self, stage: InferenceStage, block: list[Windows]) -> list[Windows]:
        """The windows one module further up, which is alone on the device meanwhile; fewer at once where they do not fit."""

        def up(samples: int) -> list[Windows]:
            self._samples = samples
            module = stage.on_device(self._device)
            return [self._pass(module, stage, windows) for windows in block]

        return halve_until_it_fits(up, self._samples, 1, self._device)

    def _pass(self, module: Module, stage: InferenceStage, windows: Windows) -> Windows:
        outputs, firsts, lengths = [], [], []
        for start in range(0, len(windows.frames), self._samples):
            samples = slice(start, start + self._samples)
            with torch.no_grad(), autocast(self._device, stage.output_format.precision):
                frames = on_device(windows.frames, self._device, samples)
                passed, first, length = module.window(frames, windows.firsts[samples], windows.lengths[samples])
                del frames
                kept = stage.as_stored(passed)
                with uncounted():
                    outputs.append(kept.to("cpu", copy=True))
                del kept
                del passed
            firsts.append(first)
            lengths.append(length)
        with uncounted():
            frames = torch.cat(outputs)
        return Windows(frames, np.concatenate(firsts), np.concatenate(lengths), windows.real)

    def _bytes(self, samples: int, frames: int) -> int:
        """Host memory of windows at the two levels next to each other that take most."""
        sizes = []
        for spec, stage in zip(reversed(self._specs), reversed(self._stages), strict=True):
            sizes.append(frames * math.prod(spec.output_shape))
            start, stop = stage.module.inputs_of(0, frames)
            frames = stop - start
        sizes.append(frames * math.prod(self._specs[0].frame_shape))
        return samples * 4 * max(map(sum, pairwise(sizes)))

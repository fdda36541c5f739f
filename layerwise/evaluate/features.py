"""What a probe sees of a sample: means over a grid of its frames, or single frames where the label is per frame.

They come from a cache, or pass through trained or random stages from the data on, under the budget; nothing is cached then.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from layerwise.cache import ActivationCache
from layerwise.config import Config
from layerwise.data.batches import group_renderings
from layerwise.data.source import Subset
from layerwise.errors import BudgetError
from layerwise.evaluate.examples import FeatureRows, Poll
from layerwise.evaluate.targets import ProbeTask, choose_frames
from layerwise.memory.meter import host_tensor, uncounted
from layerwise.nets.layer import vectors
from layerwise.stop import StopFlag
from layerwise.training.context import RunContext
from layerwise.training.forward import InferenceStage, forward_all, within_budget
from layerwise.training.loader import SourceLoader

READ_FRAMES = 65_536
"""Frames that are read from a cache at once."""


class SampleSummary:
    """Takes the frames of one sample, piece by piece, and keeps their means over the cells of a grid, or the chosen ones."""

    def __init__(self, task: ProbeTask, sample: int, length: int) -> None:
        """length: frames of the sample."""
        self._grid, self._per_frame, self._whole = task.grid, task.per_frame, task.whole
        columns = task.data.columns if length % task.data.columns == 0 else 1
        self._places: tuple[int, ...] = (length // columns, columns)
        # Of sequences every sample has as many cells, the shortest too; pictures are all of one size.
        self._cells: tuple[int, ...] = (self._grid, 1) if columns == 1 else _at_most(self._grid, self._places)
        self._chosen = choose_frames(sample, length, task.per_frame)
        self._frames = 0
        self._means: torch.Tensor | None = None
        self._kept: list[torch.Tensor] = []

    def add(self, frames: torch.Tensor) -> None:
        """The next frames [n, C, *positions] of the sample; of one that is read whole, the positions count as frames."""
        if not len(frames):
            return
        if self._whole and frames.dim() > 2 and not self._per_frame:
            self._places = tuple(frames.shape[2:])
            self._cells = _at_most(self._grid, self._places)
            piece = frames[0].float().flatten(1).T
        else:
            piece = vectors(frames[None].float())[0]
        first, self._frames = self._frames, self._frames + len(piece)
        if self._per_frame:
            here = self._chosen[(self._chosen >= first) & (self._chosen < self._frames)] - first
            kept = piece[host_tensor(here).to(piece.device)]
            with uncounted():
                self._kept.append(kept.to("cpu", copy=True))
        else:
            shares = host_tensor(shares_of_cells(range(first, self._frames), self._places, self._cells))
            means = shares.to(piece.device) @ piece
            self._means = means if self._means is None else self._means + means

    def features(self) -> np.ndarray:
        """float32 [1, cells * C], the mean of each cell; or [F, C], the chosen frames, where the label is per frame."""
        if self._per_frame:
            return torch.cat(self._kept).numpy()
        assert self._means is not None
        return self._means.cpu().numpy().reshape(1, -1)


def _at_most(grid: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Cells along each axis."""
    return tuple(min(grid, length) for length in shape)


def shares_of_cells(places: range, shape: tuple[int, ...], cells: tuple[int, ...]) -> np.ndarray:
    """float32 [cells, places]: what each place counts in the mean of each cell, as in torch's adaptive average pooling.

    shape: of all places, which are numbered row after row; cells: along each axis.
    """
    shares = np.ones((1, len(places)), dtype=np.float32)
    axes = np.unravel_index(np.arange(places.start, places.stop), shape)
    for along, length, count in zip(axes, shape, cells, strict=True):
        cell = np.arange(count)[:, None]
        first, stop = cell * length // count, -(-(cell + 1) * length // count)
        of_axis = ((along >= first) & (along < stop)) / (stop - first)
        shares = (shares[:, None] * of_axis.astype(np.float32)).reshape(-1, len(places))
    return shares


def cached_features(cache: ActivationCache, task: ProbeTask, into: FeatureRows, poll: Poll = lambda: None) -> None:
    """Features of the task's samples from a cache, in their order: a row each, or one per chosen frame.

    `poll` is called before each sample and may raise.
    """
    for sample in task.samples.tolist():
        poll()
        length = int(cache.lengths[sample])
        summary = SampleSummary(task, sample, length)
        for start in range(0, length, READ_FRAMES):
            summary.add(cache.read(sample, start, min(start + READ_FRAMES, length)))
        into.append(summary.features())


def features_under_budget(
    config: Config,
    task: ProbeTask,
    stages: Sequence[InferenceStage],
    folder: Path,
    stop: StopFlag,
    notify: Callable[[int], None] = lambda done: None,
) -> tuple[list[FeatureRows], int]:
    """Features of each stage, in files in the folder, and the bytes on the device that they took.

    Each file has a row for each sample of the task, or one per chosen frame where it asks per frame; of view 0, in the
    samples' order. stages: the first ones of the network. notify: is told how many samples are done. Raises BudgetError where
    --gpu-mem does not hold even short pieces, Interrupted between two pieces.
    """
    data = Subset(task.data, task.samples)

    def pass_all(piece: int, context: RunContext) -> list[FeatureRows]:
        files = [FeatureRows(folder) for _ in stages]
        summaries: dict[tuple[int, int], SampleSummary] = {}
        lengths, of_stages = data.lengths, []
        for stage in stages:
            lengths = stage.module.out_length(lengths)
            of_stages.append(lengths)

        def keep(number: int, sample: int, frames: torch.Tensor) -> None:
            if (number, sample) not in summaries:
                length = int(of_stages[number][sample])
                summaries[number, sample] = SampleSummary(task, int(task.samples[sample]), length)
            summaries[number, sample].add(frames)

        loader = SourceLoader(data)
        for sample, _, last in forward_all(stages, loader, group_renderings(data.lengths, piece), keep, context):
            context.stop.raise_if_set("while probing")
            if last:
                for number, file in enumerate(files):
                    file.append(summaries.pop((number, sample)).features())
                notify(sample + 1)
        return files

    try:
        return within_budget(pass_all, config, task.data, stop)
    except BudgetError as error:
        raise BudgetError(
            f"The run's --gpu-mem of {config.memory.gpu_mem} bytes cannot hold the probe: {error} Start the run again with a "
            "larger --gpu-mem, which changes nothing else, and probe then."
        ) from None

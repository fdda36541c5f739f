"""What a probe sees of a sample: the mean over its frames, or single frames where the label is per frame.

They come from a cache, or pass through trained or random stages from the data on, under the budget; nothing is cached then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class SampleSummary:
    """Takes the frames of one sample, piece by piece, and keeps their mean and the chosen ones."""

    chosen: np.ndarray
    """Sorted int64 [F], the frames to keep."""
    frames: int = 0
    total: torch.Tensor | None = None
    kept: list[torch.Tensor] = field(default_factory=list)

    def add(self, frames: torch.Tensor) -> None:
        """The next frames [n, *frame shape] of the sample."""
        if not len(frames):
            return
        piece = vectors(frames[None].float())[0]
        self.total = piece.sum(0) if self.total is None else self.total + piece.sum(0)
        here = self.chosen[(self.chosen >= self.frames) & (self.chosen < self.frames + len(frames))] - self.frames
        kept = piece[host_tensor(here).to(piece.device)]
        with uncounted():
            self.kept.append(kept.to("cpu", copy=True))
        self.frames += len(frames)

    def features(self, per_frame: bool) -> np.ndarray:
        """float32 [1, C], the mean of the frames; or [F, C], the chosen ones, where per_frame."""
        if per_frame:
            return torch.cat(self.kept).numpy()
        assert self.total is not None
        return (self.total / self.frames).cpu().numpy()[None]


def cached_features(
    cache: ActivationCache, samples: np.ndarray, per_frame: bool, into: FeatureRows, poll: Poll = lambda: None
) -> None:
    """Features of the samples from a cache, in their order: a row each, or one per chosen frame where per_frame.

    `poll` is called before each sample and may raise.
    """
    for sample in samples.tolist():
        poll()
        length = int(cache.lengths[sample])
        summary = SampleSummary(choose_frames(sample, length, per_frame))
        for start in range(0, length, READ_FRAMES):
            summary.add(cache.read(sample, start, min(start + READ_FRAMES, length)))
        into.append(summary.features(per_frame))


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
                chosen = choose_frames(int(task.samples[sample]), length, task.per_frame)
                summaries[number, sample] = SampleSummary(chosen)
            summaries[number, sample].add(frames)

        loader = SourceLoader(data)
        for sample, _, last in forward_all(stages, loader, group_renderings(data.lengths, piece), keep, context):
            context.stop.raise_if_set("while probing")
            if last:
                for number, file in enumerate(files):
                    file.append(summaries.pop((number, sample)).features(task.per_frame))
                notify(sample + 1)
        return files

    try:
        return within_budget(pass_all, config, task.data, stop)
    except BudgetError as error:
        raise BudgetError(
            f"The run's --gpu-mem of {config.memory.gpu_mem} bytes cannot hold the probe: {error} Start the run again with a "
            "larger --gpu-mem, which changes nothing else, and probe then."
        ) from None

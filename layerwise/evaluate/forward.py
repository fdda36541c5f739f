"""Features of samples that pass through trained or random stages from the data on, under the budget; nothing is cached."""

from collections.abc import Sequence
from pathlib import Path

import torch

from layerwise.config import Config
from layerwise.data.batches import group_renderings
from layerwise.data.source import Subset
from layerwise.errors import BudgetError
from layerwise.evaluate.examples import FeatureRows
from layerwise.evaluate.features import SampleSummary, choose_frames
from layerwise.evaluate.targets import ProbeTask
from layerwise.stop import StopFlag
from layerwise.training.context import RunContext
from layerwise.training.forward import InferenceStage, forward_all, within_budget
from layerwise.training.loader import SourceLoader


def features_under_budget(
    config: Config, task: ProbeTask, stages: Sequence[InferenceStage], folder: Path, stop: StopFlag
) -> tuple[list[FeatureRows], int]:
    """Features of each stage, in files in the folder, and the bytes on the device that they took.

    Each file has a row for each sample of the task, or one per chosen frame where it asks per frame; of view 0, in the
    samples' order. stages: the first ones of the network. Raises BudgetError where --gpu-mem does not hold even short
    pieces, Interrupted between two pieces.
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

        loader = SourceLoader(data, context.device)
        for sample, _, last in forward_all(stages, loader, group_renderings(data.lengths, piece), keep, context):
            context.stop.raise_if_set("while probing")
            if last:
                for number, file in enumerate(files):
                    file.append(summaries.pop((number, sample)).features(task.per_frame))
        return files

    try:
        return within_budget(pass_all, config, task.data, stop)
    except BudgetError as error:
        raise BudgetError(
            f"The run's --gpu-mem of {config.memory.gpu_mem} bytes cannot hold the probe: {error} Start the run again with a "
            "larger --gpu-mem, which changes nothing else, and probe then."
        ) from None

"""What frozen stages make of the samples that a probe asks about, under the run's budget."""

from collections.abc import Sequence
from pathlib import Path

from layerwise.config import Config
from layerwise.errors import BudgetError
from layerwise.evaluate.feature_rows import FeatureRows
from layerwise.evaluate.passed import passed_features
from layerwise.evaluate.question import Question
from layerwise.memory.allocator import meter_for
from layerwise.memory.device import cap, find_device, release, why_out_of_memory
from layerwise.stop import StopFlag
from layerwise.training.caching import SHORTEST
from layerwise.training.frozen import FrozenStage


def features_under_budget(
    config: Config, question: Question, stages: Sequence[FrozenStage], folder: Path, stop: StopFlag
) -> tuple[list[FeatureRows], int]:
    """Features of each stage, in files in the folder, and the bytes on the device that they took.

    Raises BudgetError where --gpu-mem does not hold even short pieces.
    """
    device, budget, data = find_device(config.training.device), config.memory.gpu_mem, question.data
    cap(device, budget)
    piece = config.training.batch_size * (config.data.window if data.columns == 1 else int(data.lengths[0])) // 2
    while True:
        meter = meter_for(device, budget)
        files = [FeatureRows(folder) for _ in stages]
        try:
            with meter:
                passed_features(stages, data, question.samples, piece, question.per_frame, files, device, meter, stop)
            return files, meter.peak
        except (BudgetError, RuntimeError) as error:
            reason = why_out_of_memory(error)
        if piece <= SHORTEST * data.columns:
            raise BudgetError(
                f"The run's --gpu-mem of {budget} bytes cannot hold the probe: {reason} Start the run again with a larger "
                "--gpu-mem, which changes nothing else, and probe then."
            )
        piece //= 2
        release(device)

"""New recordings or pictures through a trained encoder, under the device budget and in constant host memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from layerwise.cache.export import FeatureFile, MeanFile
from layerwise.config import Config, with_options
from layerwise.data.batches import group_renderings
from layerwise.data.open import open_input
from layerwise.data.source import DataSet, Skipped, Subset
from layerwise.encoder.load import Given, entry_of, load_stages
from layerwise.encoder.model import Encoder
from layerwise.errors import BudgetError, DataError
from layerwise.stop import StopFlag
from layerwise.training.context import RunContext
from layerwise.training.forward import InferenceStage, forward_all, to_host, within_budget
from layerwise.training.loader import SourceLoader


@dataclass(frozen=True, slots=True)
class Extracted:
    """A finished file of features."""

    path: Path
    stage: int
    samples: int
    rows: int
    """Of the file: frames, or samples where it holds means."""
    skipped: tuple[Skipped, ...]
    """Files that could not be used, and why."""
    peak_bytes: int
    """Most that was held on the device."""


def extract(
    run_directory: str | Path,
    source: str | Path,
    output: str | Path,
    *,
    stage: int | None = None,
    mean: bool = False,
    gpu_mem: str | int | None = None,
    device: str | None = None,
    network: Given = None,
    stop: StopFlag | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Extracted:
    """Writes the features of new samples as .npy or .h5, by the name of `output`, laid out as `layerwise cache export` does.

    source: a file, a folder, or KIND:PATH as --data takes it. stage: whose outputs; default: the last. mean: one row per
    sample instead of its frames. gpu_mem, device: in place of the run's. network: as in `load`. A file that cannot be used
    is skipped and named. Raises RunError, ConfigError, DataError, BudgetError or CacheError where the request cannot be met,
    and Interrupted between two pieces; then nothing is left of the output.
    """
    output, stop = Path(output), stop or StopFlag()
    origin, stages = load_stages(Path(run_directory), stage, network)
    asked = {"memory.gpu_mem": gpu_mem, "training.device": device}
    config = with_options(origin.config, {key: value for key, value in asked.items() if value is not None})
    encoder = Encoder(entry_of(origin), [each.module for each in stages])
    shape = tuple(origin.frame_shape)
    data = open_input(str(source), config, origin.takes, shape, origin.level, encoder.shortest)
    dtype = np.dtype(np.float16 if stages[-1].output_format.dtype == "float16" else np.float32)
    with torch.no_grad():
        *_, outputs = encoder.frames_of_stages(
            torch.zeros(1, int(encoder.entry.frames_of(encoder.shortest)), *data.frame_shape)
        )
    kind = MeanFile if mean else FeatureFile
    with kind(output, tuple(outputs.shape[2:]), dtype, len(stages)) as file:
        kept, skipped, peak = _fill(file, stages, data, config, stop, notify)
        if not kept:
            raise DataError(f"Not one file of {source} could be read to its end; the first: {skipped[0].reason}")
        file.finish({name: values[kept] for name, values in data.labels.items()})
    return Extracted(output, len(stages), len(kept), file.rows, (*data.skipped, *skipped), peak)


def _fill(
    file: FeatureFile,
    stages: Sequence[InferenceStage],
    data: DataSet,
    config: Config,
    stop: StopFlag,
    notify: Callable[[str], None],
) -> tuple[list[int], list[Skipped], int]:
    """Numbers of the samples whose features are in the file, what could not be read, and bytes on the device."""
    kept: list[int] = []
    skipped: list[Skipped] = []
    done = 0

    def keep(number: int, sample: int, frames: torch.Tensor) -> np.ndarray:
        """Of the last stage as a cache holds them; bfloat16 and int8 as float32."""
        if number + 1 < len(stages):
            return np.empty(0)
        return to_host(frames if frames.dtype == torch.float16 else frames.float())

    def pass_all(piece: int, context: RunContext) -> None:
        nonlocal done
        file.drop()  # what an earlier attempt has left of a sample
        first, source = done, _Readable(data, done)
        groups = group_renderings(source.lengths, piece)
        for number, rows, last in forward_all(stages, SourceLoader(source, context.device), groups, keep, context):
            stop.raise_if_set("before the features were whole, so none are left")
            sample = first + number
            file.append(rows)
            if last:
                done = sample + 1
                if number in source.faults:
                    file.drop()
                    skipped.append(Skipped(data.ids[sample], source.faults[number]))
                else:
                    file.keep(data.ids[sample])
                    kept.append(sample)
                notify(f"{done} of {len(data.ids)}")

    try:
        _, peak = within_budget(pass_all, config, data, stop)
    except BudgetError as error:
        why = str(error).partition("; ")[0].rstrip(".")  # behind it stands advice for training
        raise BudgetError(
            f"--gpu-mem of {config.memory.gpu_mem} bytes cannot hold the encoder: {why}; give a larger one."
        ) from None
    return kept, skipped, peak


class _Readable(Subset):
    """Samples `first` on. One that cannot be read is zeros from where it fails, and `faults` says why."""

    def __init__(self, data: DataSet, first: int) -> None:
        super().__init__(data, np.arange(first, len(data.ids)))
        self.faults: dict[int, str] = {}

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        if sample not in self.faults:
            try:
                return super().read(sample, start, stop)
            except DataError as error:
                self.faults[sample] = str(error)
        return torch.zeros(stop - start, *self.frame_shape)

"""New recordings or pictures through a trained encoder, under the device budget and in constant host memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from layerwise.cache.export import FeatureFile, MeanFile
from layerwise.config import Config, with_options
from layerwise.data.open import open_input
from layerwise.data.source import DataSet, Skipped
from layerwise.encoder.load import Given, entry_of, load_stages
from layerwise.encoder.model import Encoder
from layerwise.encoder.passing import pass_through
from layerwise.errors import BudgetError, DataError
from layerwise.memory.device import cap, find_device, release, why_out_of_memory
from layerwise.memory.meter import meter_for
from layerwise.stop import StopFlag
from layerwise.training.forward import SHORTEST, InferenceStage, longest_piece_of_samples


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
    dtype = np.dtype(np.float16 if stages[-1].handing.dtype == "float16" else np.float32)
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
    device, budget = find_device(config.training.device), config.memory.gpu_mem
    cap(device, budget)
    piece = longest_piece_of_samples(config, data)
    kept: list[int] = []
    skipped: list[Skipped] = []
    done = peak = 0
    while done < len(data.ids):
        meter, reason = meter_for(device, budget), None
        try:
            with meter:
                for passed in pass_through(stages, data, done, piece, device, meter):
                    stop.raise_if_set("before the features were whole, so none are left")
                    name = data.ids[passed.sample]
                    if passed.rows is None:
                        file.drop()
                        skipped.append(Skipped(name, passed.fault))
                    else:
                        file.append(passed.rows)
                        if passed.last:
                            file.keep(name)
                            kept.append(passed.sample)
                    if passed.last:
                        done = passed.sample + 1
                        notify(f"{done} of {len(data.ids)}")
        except (BudgetError, RuntimeError) as error:
            reason = why_out_of_memory(error)
        # The meter counts what it refuses, too.
        peak = max(peak, meter.peak if budget is None else min(meter.peak, budget))
        if reason is not None:
            file.drop()
            release(device)
            if piece <= SHORTEST * data.columns:
                why = reason.partition("; ")[0].rstrip(".")  # behind it stands advice for training
                raise BudgetError(f"--gpu-mem of {budget} bytes cannot hold the encoder: {why}; give a larger one.")
            piece //= 2
    return kept, skipped, peak

"""New recordings or pictures through a trained encoder, under the device budget and in constant host memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.cache.export import FeatureFile, MeanFile
from layerwise.config import Config, with_options
from layerwise.data.batches import Batch, Group, at_length, collate, group_renderings, read_ahead
from layerwise.data.labels import with_labels
from layerwise.data.open import open_input
from layerwise.data.source import DataSet, Skipped, Subset
from layerwise.encoder.entry import row_places
from layerwise.encoder.load import Given, entry_of, load_stages
from layerwise.encoder.model import Encoder
from layerwise.errors import BudgetError, DataError
from layerwise.events import Message, NotifyProgress, Progress, unseen
from layerwise.nets.module import Geometry
from layerwise.run_store import RunStore
from layerwise.stop import StopFlag
from layerwise.training.context import RunContext
from layerwise.training.forward import InferenceStage, forward_all, to_host, within_budget
from layerwise.training.loader import Offload, SourceLoader


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
    labels: str | Path = "",
    stop: StopFlag | None = None,
    notify: NotifyProgress = unseen,
) -> Extracted:
    """Writes the features of new samples as .npy, .h5, .npz or .parquet, by the name of `output`; see cache/feature_formats.py.

    source: a file, a folder, or KIND:PATH as --data takes it. stage: whose outputs; default: the last. mean: one row per
    sample instead of its frames. gpu_mem, device: default: those of the run, where it is one. network: as in `load`. labels: a
    CSV file, as `run` takes it, of labels to be written beside the features. notify: is told what was found in it, and how far
    the work is. A file that cannot be used is skipped and named. Raises RunError, ConfigError, DataError, BudgetError or
    CacheError where the request cannot be met, and Interrupted between two pieces; then nothing is left of the output.
    """
    output, stop = Path(output), stop or StopFlag()
    origin, stages = load_stages(Path(run_directory), stage, network)
    given = {"memory.gpu_mem": gpu_mem, "training.device": device}
    asked = _of_the_run(Path(run_directory)) | {key: value for key, value in given.items() if value is not None}
    config = with_options(origin.config, asked)
    encoder = Encoder(entry_of(origin), [each.module for each in stages])
    shape = tuple(origin.frame_shape)
    data = open_input(str(source), config, origin.takes, shape, origin.level, encoder.shortest)
    if labels:
        data = with_labels(data, str(labels))
        for line in getattr(data, "notes", ()):
            notify(Message(line))
    dtype = np.dtype(np.float16 if stages[-1].output_format.dtype == "float16" else np.float32)
    with torch.no_grad():
        *_, outputs = encoder.frames_of_stages(
            torch.zeros(1, int(encoder.entry.frames_of(encoder.shortest)), *data.frame_shape)
        )
    rows, geometry = data.lengths, Geometry()
    for layer in encoder.layers.values():
        rows, geometry = layer.out_length(rows), geometry.after(layer)
    kind = MeanFile if mean else FeatureFile
    places = row_places(origin.config.data, origin.takes, geometry.hop, geometry.offset)
    with kind(output, tuple(outputs.shape[2:]), dtype, len(stages), places) as file:
        kept, skipped, peak = _fill(file, stages, data, config, stop, _FrameCount(rows, notify))
        if not kept:
            raise DataError(f"Not one file of {source} could be read to its end; the first: {skipped[0].reason}")
        file.finish({name: values[kept] for name, values in data.labels.items()})
    return Extracted(output, len(stages), len(kept), file.rows, (*data.skipped, *skipped), peak)


def _of_the_run(place: Path) -> dict[str, Any]:
    """Its budget and its device; an encoder that was taken elsewhere knows none."""
    store = RunStore(place, place)
    if not store.exists:
        return {}
    config = store.load_state().config
    return {"memory.gpu_mem": config.memory.gpu_mem, "training.device": config.training.device}


def _fill(
    file: FeatureFile,
    stages: Sequence[InferenceStage],
    data: DataSet,
    config: Config,
    stop: StopFlag,
    count: "_FrameCount",
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
        first, source = done, Subset(data, np.arange(done, len(data.ids)))
        loader, groups = _ReadableLoader(source), group_renderings(source.lengths, piece)

        def skip_to(sample: int) -> None:
            """Those that are passed over could not be read, or not to their end."""
            nonlocal done
            while done < sample:
                file.drop()
                skipped.append(Skipped(data.ids[done], loader.faults[done - first]))
                done += 1
                count.show(done)

        for number, rows, last in forward_all(stages, loader, groups, keep, context):
            stop.raise_if_set("before the features were whole, so none are left")
            sample = first + number
            skip_to(sample)
            file.append(rows)
            if last:
                file.keep(data.ids[sample])
                kept.append(sample)
                done = sample + 1
            count.show(done, 0 if last else len(rows))
        skip_to(len(data.ids))

    try:
        _, peak = within_budget(pass_all, config, data, stop)
    except BudgetError as error:
        why = str(error).partition("; ")[0].rstrip(".")  # behind it stands advice for training
        raise BudgetError(
            f"--gpu-mem of {config.memory.gpu_mem} bytes cannot hold the encoder: {why}; give a larger one."
        ) from None
    return kept, skipped, peak


class _FrameCount:
    """Frames of features that are made: samples are of any length."""

    def __init__(self, rows: np.ndarray, notify: NotifyProgress) -> None:
        """rows: int64 [N], frames of each sample."""
        self._until, self._notify = np.append(0, np.cumsum(rows)), notify
        self._samples = self._more = 0

    def show(self, samples: int, more: int = 0) -> None:
        """So many samples are done, and `more` frames of the next one since the last call."""
        self._more = more + (self._more if samples == self._samples else 0)
        self._samples = samples
        self._notify(Progress("", int(self._until[samples]) + self._more, int(self._until[-1])))


class _ReadableLoader(SourceLoader):
    """Leaves out what cannot be read; of a sample that is read in pieces, those behind it too."""

    def __init__(self, source: Subset) -> None:
        super().__init__(source)
        self.faults: dict[int, str] = {}
        """Number of a sample to why it cannot be read."""

    def pieces(self, groups: Sequence[Group], offloaded: Offload) -> Iterator[Batch]:
        return read_ahead(partial(self._read_piece, group, start) for group in groups for start in group.starts)

    def _read_piece(self, group: Group, start: int) -> Batch:
        samples, frames = [], []
        for sample in range(group.first, group.stop):
            if sample in self.faults:
                continue
            try:
                frames.append(self._source.read(sample, start, min(start + group.piece, int(self.lengths[sample]))))
                samples.append(sample)
            except DataError as error:
                self.faults[sample] = str(error)
        batch = collate(frames) if frames else Batch(torch.empty(0), np.empty(0, dtype=np.int64))
        if frames and not group.streamed:
            batch = at_length(batch, group.longest)
        return replace(batch, renderings=np.array(samples, dtype=np.int64))

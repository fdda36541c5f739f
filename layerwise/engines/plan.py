"""A run before it is started: what each stage will take on the device, on the disk and on the host, and whether it fits.

A glance at the data of a run that is only thought of."""

import math
from dataclasses import dataclass

import psutil
import torch

from layerwise.cache.dtypes import STORED
from layerwise.config import Config
from layerwise.data.batches import READ_AHEAD
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError
from layerwise.forecast import Forecast, StageForecast
from layerwise.memory.device import context_bytes, find_device
from layerwise.nets import shortest_sample
from layerwise.nets.network import Network
from layerwise.run_store import RunPaths
from layerwise.training.budget import fitting_layout, peaks, smallest_budget, smallest_layout
from layerwise.training.cache_plan import (
    CachePlan,
    CacheSize,
    below,
    cache_sizes,
    disk_peak,
    free_for_caches,
    input_kind,
    plan_caches,
    rounds_under_way,
)
from layerwise.training.cut import cut_network
from layerwise.training.optimizer import Optimization
from layerwise.training.peaks import training_peak
from layerwise.training.recompute import BLOCK_BYTES
from layerwise.training.spec import StageSpec


def plan(
    config: Config,
    *,
    network: Network | None = None,
    data: DataSet | None = None,
    optimization: Optimization | None = None,
) -> Forecast:
    """Predicts a run without running anything. network, data, optimization: as in `run`.

    Raises LayerwiseErrors where it could not even be begun.
    """
    if config.training.schedule == "simultaneous":
        raise ConfigError("plan predicts one stage at a time; leave training.schedule simultaneous out.")
    device = find_device(config.training.device)
    data = data or open_data(config.data, shortest_sample(config))
    specs = cut_network(config, data, device, network, optimization=optimization)
    folder = RunPaths.of(config.out, config.cache.dir).caches
    storage = plan_caches(config, specs, data, free_for_caches(folder))
    rooms = cache_sizes(specs, data, config.cache)
    stages = [_forecast(config, specs, stage, storage, room, device) for stage, room in zip(specs, rooms, strict=True)]
    return Forecast(
        budget_bytes=config.memory.gpu_mem,
        fits=all(stage.fits for stage in stages),
        smallest_budget_bytes=max(
            smallest_budget(config, stage, device, below(specs, stage.stage, storage)) for stage in specs
        ),
        peak_bytes=max(max(s.train_peak_bytes, s.cache_peak_bytes) for s in stages) + context_bytes(device),
        cache_bytes=sum(stage.cache_bytes for stage in stages if stage.cached),
        disk_bytes=disk_peak(config.cache, rooms, storage) * rounds_under_way(config, len(specs)),
        disk_budget_bytes=config.cache.disk,
        notes=list(storage.notes),
        host_bytes=max(stage.host_bytes for stage in stages),
        device=str(device),
        stages=stages,
    )


def _forecast(
    config: Config, specs: list[StageSpec], stage: StageSpec, storage: CachePlan, room: CacheSize, device: torch.device
) -> StageForecast:
    recomputed = below(specs, stage.stage, storage)
    fitting = fitting_layout(config, stage, device, recomputed)
    layout = fitting or smallest_layout(config, stage, recomputed)
    training, caching = peaks(config, stage, device, recomputed, layout)
    return StageForecast(
        stage=stage.stage,
        layers=len(stage.layers),
        parameters=stage.parameters,
        train_peak_bytes=training,
        train_peak_by_kind={
            str(kind): most for kind, most in training_peak(config, stage, layout.placement).by_kind.items()
        },
        cache_peak_bytes=caching,
        micro_batch=layout.placement.micro_batch,
        layout=str(layout.placement),
        why=layout.why,
        fits=fitting is not None,
        cache_bytes=room.activations,
        cached=storage.cached[stage.stage - 1],
        host_bytes=_host_bytes(config, stage, layout.placement.optimizer_on_host, recomputing=bool(recomputed)),
        input=input_kind(stage.stage, storage),
    )


def _host_bytes(config: Config, stage: StageSpec, optimizer_on_host: bool, recomputing: bool) -> int:
    """What the process holds in host memory: itself, batches that are read ahead, blocks that are written, checkpoints."""
    stored = 4 if stage.stage == 1 else STORED[config.cache.dtype].tensor.itemsize
    batch = config.training.batch_size * stage.window.frames * math.prod(stage.frame_shape) * stored
    objective = stage.build_objective(config, torch.device("meta"))
    predictors = sum(parameter.numel() for parameter in objective.parameters())
    trained = 4 * (stage.parameters + predictors)
    # A checkpoint is gathered, then serialised: values and two moments, twice; the best weights stay.
    checkpoint = 2 * 3 * trained + 4 * stage.parameters
    itself = psutil.Process().memory_info().rss
    on_host = 4 * trained if optimizer_on_host else 0
    block = BLOCK_BYTES + 3 * trained if recomputing else 0
    return itself + block + (READ_AHEAD + 2) * batch + 2 * int(config.cache.block) + checkpoint + on_host


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What a run would find."""

    samples: int
    skipped: int
    """Files that could not be used."""
    labels: tuple[str, ...]


def look(config: Config) -> DataSummary:
    """Opens the data as a run does. Raises DataError where it could not."""
    data = open_data(config.data, shortest_sample(config))
    return DataSummary(len(data.ids), len(data.skipped), (*data.labels, *data.frame_label_names))

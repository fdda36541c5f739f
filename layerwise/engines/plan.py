"""A run before it is started: what each stage will take on the device, on the disk and on the host, and whether it fits."""

import math
from collections.abc import Callable, Sequence

import psutil
import torch

from layerwise.cache.dtypes import STORED
from layerwise.config import Config, with_options
from layerwise.data.batches import READ_AHEAD
from layerwise.data.open import open_data
from layerwise.data.source import DataSet, said_of, telling_labels
from layerwise.errors import ConfigError
from layerwise.forecast import END_TO_END, Forecast, StageForecast, is_end_to_end
from layerwise.memory.determinism import settle_products
from layerwise.memory.device import find_device
from layerwise.memory.driver import beside_tensors, segments_of, why_less_than_budget
from layerwise.memory.plan import MemoryPlan
from layerwise.memory.rates import measured_rates
from layerwise.nets import build_network, shortest_sample
from layerwise.nets.network import Network
from layerwise.run_store import RunStore
from layerwise.training.budget import fit_stage, peaks_of_plan, smallest_budget, smallest_plan
from layerwise.training.cache_plan import (
    CachePlan,
    CacheSize,
    cache_sizes,
    disk_peak,
    free_for_caches,
    plan_caches,
    rounds_under_way,
)
from layerwise.training.cut import cut_network
from layerwise.training.optimizer import Optimization
from layerwise.training.recompute import BLOCK_BYTES
from layerwise.training.resident import rows_of_input
from layerwise.training.samples import TRAIN, split_samples
from layerwise.training.spec import StageSpec
from layerwise.training.training_peak import training_peak
from layerwise.training.work import step_flops, step_moved, step_operations, waiting_bytes
from layerwise.units import size


def plan(
    config: Config,
    *,
    network: Network | None = None,
    data: DataSet | None = None,
    optimization: Optimization | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Forecast:
    """Predicts a run without running anything. network, data, optimization: as in `run`; notify: is told what it is at.

    Raises LayerwiseErrors where it could not even be begun.
    """
    if config.training.schedule == "simultaneous":
        raise ConfigError("plan predicts one stage at a time; leave training.schedule simultaneous out.")
    settle_products(config.training.deterministic)
    device = find_device(config.training.device)
    data = data or open_data(config.data, shortest_sample(config))
    specs = cut_network(config, data, device, network, optimization=optimization)
    folder = RunStore.of(config.out, config.cache.dir).caches
    cache_plan = plan_caches(config, specs, data, free_for_caches(folder))
    sizes = cache_sizes(specs, data, config.cache)
    stages, plans = [], []
    for spec in specs:
        notify(f"rehearsing stage {spec.stage} of {len(specs)}")
        below = cache_plan.below(spec.stage, specs)
        fitting = fit_stage(config, spec, device, below, rows_of_input(config, spec, cache_plan))
        plans.append(fitting or smallest_plan(config, spec, below, device))
        stages.append(_forecast(config, specs, cache_plan, sizes, device, spec, plans[-1], fitting is not None))
    return Forecast(
        budget_bytes=config.memory.gpu_mem,
        fits=all(stage.fits for stage in stages),
        smallest_budget_bytes=_smallest_budget(config, specs, stages, cache_plan, device),
        peak_bytes=max(map(_peak, stages)) + beside_tensors(device),
        cache_bytes=sum(stage.cache_bytes for stage in stages if stage.cached),
        disk_bytes=disk_peak(config.cache, sizes, cache_plan) * rounds_under_way(config, len(specs)),
        disk_budget_bytes=config.cache.disk,
        notes=[*_notes(config, specs, cache_plan, device), *_of_renderings(data, stages), *said_of(data)],
        host_bytes=max(stage.host_bytes for stage in stages),
        hours=_hours(config, data, specs, plans, device),
        device=str(device),
        stages=stages,
    )


def _smallest_budget(
    config: Config,
    specs: Sequence[StageSpec],
    stages: Sequence[StageForecast],
    cache_plan: CachePlan,
    device: torch.device,
) -> int:
    """That of the neediest stage. A stage needs no more than it takes as it is planned, so few have to be looked at."""
    smallest = 0
    for stage in sorted(stages, key=_peak, reverse=True):
        if _peak(stage) + beside_tensors(device) > smallest:
            below = cache_plan.below(stage.stage, specs)
            smallest = max(smallest, smallest_budget(config, specs[stage.stage - 1], device, below))
    return smallest


def _peak(stage: StageForecast) -> int:
    return max(stage.train_peak_bytes, stage.cache_peak_bytes)


def _notes(config: Config, specs: Sequence[StageSpec], cache_plan: CachePlan, device: torch.device) -> list[str]:
    less = why_less_than_budget(device, config.memory.gpu_mem)
    end_to_end = is_end_to_end([len(spec.layers) for spec in specs])
    return [less] * bool(less) + [END_TO_END] * end_to_end + list(cache_plan.notes)


def _of_renderings(data: DataSet, stages: Sequence[StageForecast]) -> list[str]:
    """What each of several costs on the disk. Of the last stage there is one alone."""
    cached = sum(stage.cache_bytes for stage in stages[:-1] if stage.cached)
    if data.views == 1 or not cached:
        return []
    return [
        f"the caches below the last stage hold {data.views} renderings of each sample, {size(cached // data.views)} for each; "
        "see --views"
    ]


def sweep(config: Config, notify: Callable[[str], None] = lambda line: None) -> list[Forecast]:
    """Predicts the run for cuts from one stage, which is end-to-end training by the same means, to the finest one.

    Parameters and errors as those of `plan`.
    """
    data = open_data(config.data, shortest_sample(config))
    network = build_network(config.net, data.frame_shape, config.training.seed)
    most = len(network.layers)
    counts = {min(round(2 ** (power / 2)), most) for power in range(2 * most.bit_length() + 1)}
    counts |= {len(network.natural_cut)}
    return [
        plan(with_options(config, {"training.stages": count}), network=network, data=data, notify=notify)
        for count in sorted(counts)
    ]


def _hours(
    config: Config, data: DataSet, specs: Sequence[StageSpec], plans: Sequence[MemoryPlan], device: torch.device
) -> float:
    """Of all steps, one after another, computing and moving never at the same time."""
    samples = int((split_samples(data, config) == TRAIN).sum())
    steps = -(-samples // config.training.batch_size) * config.training.max_epochs
    rates = measured_rates(device)
    ratio = rates.flops / rates.bytes
    operations = sum(step_operations(config, spec, plan, ratio) for spec, plan in zip(specs, plans, strict=True))
    return steps * operations / rates.flops / 3600


def _forecast(
    config: Config,
    specs: Sequence[StageSpec],
    cache_plan: CachePlan,
    sizes: Sequence[CacheSize],
    device: torch.device,
    spec: StageSpec,
    memory_plan: MemoryPlan,
    fits: bool,
) -> StageForecast:
    below = cache_plan.below(spec.stage, specs)
    training, caching = peaks_of_plan(config, spec, device, below, memory_plan)
    by_kind = training_peak(config, spec, memory_plan, segments_of(device, memory_plan.expandable)).by_kind
    return StageForecast(
        stage=spec.stage,
        layers=len(spec.layers),
        parameters=spec.parameters,
        train_peak_bytes=training,
        train_peak_by_kind={str(kind): most for kind, most in by_kind.items()},
        cache_peak_bytes=caching,
        micro_batch=memory_plan.micro_batch,
        layout=str(memory_plan),
        why=memory_plan.why,
        fits=fits,
        cache_bytes=sizes[spec.stage - 1].activations,
        cached=cache_plan.cached[spec.stage - 1],
        host_bytes=_host_bytes(config, spec, memory_plan, device),
        flops=step_flops(config, spec, memory_plan),
        moved_bytes=step_moved(config, spec, memory_plan),
        input="device" if memory_plan.resident else cache_plan.input_kind(spec.stage),
    )


def _host_bytes(config: Config, spec: StageSpec, memory_plan: MemoryPlan, device: torch.device) -> int:
    """What the process holds in host memory: itself, batches that are read ahead, blocks that are written, checkpoints."""
    stored = 4 if spec.stage == 1 else STORED[config.cache.dtype].tensor.itemsize
    batch = config.training.batch_size * spec.window.frames * math.prod(spec.frame_shape) * stored
    objective = spec.build_objective(config, torch.device("meta"))
    predictors = sum(parameter.numel() for parameter in objective.parameters())
    trained = 4 * (spec.parameters + predictors)
    # A checkpoint is gathered, then serialised: values and two moments, twice; the best weights stay.
    checkpoint = 2 * 3 * trained + 4 * spec.parameters
    itself = psutil.Process().memory_info().rss
    on_host = 4 * trained if memory_plan.optimizer_on_host else 0
    recomputing = BLOCK_BYTES + 3 * trained if memory_plan.windows else 0
    if memory_plan.resident:
        batch = 8 * config.training.batch_size * spec.window.frames
    reading, writing = reading_bytes(batch, device, memory_plan.ahead), 2 * int(config.cache.block)
    if memory_plan.overlapped:  # two pieces of outputs, pinned
        outputs = int(spec.shapes.out_length(memory_plan.piece)) * math.prod(spec.output_shape)
        writing += 2 * _pinned_bytes(outputs * STORED[config.cache.dtype].tensor.itemsize)
    return itself + recomputing + reading + writing + checkpoint + on_host + waiting_bytes(config, spec, memory_plan)


def reading_bytes(batch: int, device: torch.device, ahead: bool = False) -> int:
    """Of batches of so many bytes that are read ahead, in host memory. ahead: whether one goes to the device before its step.

    For a GPU they lie in pinned memory, which torch rounds up to a power of two and never gives back, and are read before.
    """
    if device.type != "cuda":
        return (READ_AHEAD + 2) * batch
    return (READ_AHEAD + 2 + ahead) * _pinned_bytes(batch) + batch


def _pinned_bytes(size: int) -> int:
    return 2 ** math.ceil(math.log2(max(size, 1)))


def look(config: Config) -> tuple[DataSet, tuple[str, ...]]:
    """The data as a run would find them, and the labels by which probes can tell them apart.

    Raises DataError where a run could not use them.
    """
    data = open_data(config.data, shortest_sample(config))
    return data, telling_labels(data)

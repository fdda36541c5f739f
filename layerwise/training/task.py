"""One task from its input to its sealed cache. A task that is performed twice does its work once.

What an earlier start has finished is found on the disk and used: the best weights, the blocks of a half-written cache, the
sealed cache.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from layerwise.cache import ActivationCache
from layerwise.data.source import FrameSource
from layerwise.errors import BudgetError, UnusableCache
from layerwise.events import CachingProgress, EpochDone, Event, Notify, StageDone, StepDone
from layerwise.memory.device import release, return_free_blocks, why_out_of_memory
from layerwise.memory.driver import cap, cap_again, context_bytes, segments_of, segments_used, take_workspaces
from layerwise.memory.meter import meter_for
from layerwise.memory.ranks import ALONE
from layerwise.memory.reserved import Segments
from layerwise.run_store import StageRecord
from layerwise.training.cache_retention import check_retained_caches, delete_unneeded_caches, mend, open_cache
from layerwise.training.checkpoint import digest, load_stages, save_arrays
from layerwise.training.context import RunContext
from layerwise.training.fit import fit
from layerwise.training.forward import OutputFormat, trained_stages
from layerwise.training.loader import Loader, SourceLoader
from layerwise.training.memory_log import MemoryLog
from layerwise.training.recompute import RecomputingLoader
from layerwise.training.resident import RowNumbers, resident_rows
from layerwise.training.run import Round, fingerprint
from layerwise.training.schedule import Task
from layerwise.training.simultaneous import SimultaneousTrainer
from layerwise.training.spec import StageSpec
from layerwise.training.stage_cache import write_stage_cache, written_at
from layerwise.training.trainer import StageTrainer


def perform(task: Task, round: Round, context: RunContext) -> None:
    """Trains, caches and seals one stage and records it in run.json. A cache that cannot be read is made again, once.

    Raises Interrupted after saving.
    """
    rebuilt: set[Path] = set()
    while True:
        try:
            check_retained_caches(round)
            for stage in range(1, task.stage + 1):  # lower stages are done, unless a cache of theirs is made again
                _perform_stage(stage, round, context)
            return
        except UnusableCache as error:
            if context.ranks.count > 1:  # the other ranks have not noticed it: at the next start it is missing for all
                error.path.unlink(missing_ok=True)
            if error.path in rebuilt or context.ranks.count > 1:
                raise
            rebuilt.add(error.path)
            mend(error, round, context.notify)


def _perform_stage(stage: int, round: Round, context: RunContext) -> None:
    record = round.state.record(stage)
    if record.status == "done":
        return
    spec, device, budget = round.run.specs[stage - 1], context.device, round.state.budget_bytes
    written_at(round.store.cache(stage), round)  # an impossible cache.scratch is refused before the training
    cached_stage = round.run.cache_plan.source(stage)
    source = open_cache(cached_stage, round) if cached_stage else round.run.data
    # What came before and goes during the stage would be taken for memory that the stage gives back.
    _release_where_left(lambda: _allocated(device), device)
    segments = segments_of(device, round.run.memory_plans[stage - 1].expandable)
    allocated_before = _allocated(device)
    meter = meter_for(device, budget)
    reason = None
    try:
        log = _memory_log(stage, round, replace(context, meter=meter))
        cap(device, budget, segments)
        with segments_used(device, segments), meter, log as notify:
            notify = _Capping(device, budget, segments, notify) if segments is not None else notify
            _train_and_cache(spec, source, round, replace(context, meter=meter, notify=notify))
    except (BudgetError, RuntimeError) as error:
        reason = why_out_of_memory(error)
    finally:
        if isinstance(source, ActivationCache):
            source.close()
    if reason is not None:  # raised here, since the first error holds the tensors of the attempt
        what = "cache its outputs" if record.status == "caching" else "train"
        raise BudgetError(f"Stage {stage} does not fit into the device budget to {what}. {reason}")

    def bytes_left() -> int:
        return max(meter.live, _allocated(device) - allocated_before, 0)

    _release_where_left(bytes_left, device)
    left = bytes_left()
    if left:
        raise AssertionError(f"{left} bytes of the finished stage are still on the device")
    _record_done(round, record)
    delete_unneeded_caches(round)
    context.notify(
        StageDone(
            stage=stage,
            epochs=record.epochs,
            converged=bool(record.converged),
            best_loss=float(record.best_loss or 0),
            train_peak_bytes=record.train_peak_bytes or 0,
            cache_peak_bytes=record.cache_peak_bytes or 0,
            device_bytes_left=left,
            cache_bytes=record.cache_bytes or 0,
            seconds=record.seconds,
            round=round.number,
        )
    )


def _memory_log(stage: int, round: Round, context: RunContext) -> AbstractContextManager[Notify]:
    """Receives the events of a stage and passes them on; the first rank also logs its device memory."""
    if context.ranks.first:
        return MemoryLog(round.store.memory(stage), context.meter, context.notify)
    return nullcontext(context.notify)


class _Capping:
    """Caps the allocator again behind the first step of each kind, when all kernels that it needs have been loaded."""

    def __init__(self, device: torch.device, budget: int | None, segments: Segments, notify: Notify) -> None:
        self._device, self._budget, self._segments, self._notify = device, budget, segments, notify
        self._seen: set[type[Event]] = set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone | EpochDone | CachingProgress) and type(event) not in self._seen:
            self._seen.add(type(event))
            cap_again(self._device, self._budget, self._segments)
        self._notify(event)


def _train_and_cache(spec: StageSpec, source: FrameSource, round: Round, context: RunContext) -> None:
    record = round.state.record(spec.stage)
    loader = _loader(spec.stage, source, round, context)
    live_before = context.meter.live
    take_workspaces(context.device)
    if record.status != "caching" or not round.store.weights(spec.stage).exists():
        _train(spec, loader, round, context)
    _release_where_left(lambda: context.meter.live - live_before, context.device)
    _record_driver_bytes(context.device, record)
    context.meter.reset_peak()
    take_workspaces(context.device)
    # Probes read the outputs of the last stage in the last round only.
    nobody_reads_it = spec.stage == len(round.run.specs) and not round.is_last
    if round.run.cache_plan.cached[spec.stage - 1] and not nobody_reads_it:
        delete_unneeded_caches(round)
        write_stage_cache(spec, loader, round, context)
        _record_driver_bytes(context.device, record)


def _record_driver_bytes(device: torch.device, record: StageRecord) -> None:
    """On CUDA, the most that the allocator and the driver have had in the pass that has ended, beside the meter."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        record.allocator_bytes = max(reserved, record.allocator_bytes or 0)
        record.driver_bytes = max(context_bytes(device) + reserved, record.driver_bytes or 0)


def _loader(stage: int, source: FrameSource, round: Round, context: RunContext) -> Loader:
    """Reads the source, and passes it through the stages in between where these are not cached."""
    run = round.run
    specs = run.cache_plan.below(stage, run.specs)
    # input_noise is relative to the level of the whole batch, so every rank reads all of it.
    ranks = ALONE if run.config.training.input_noise else context.ranks
    record = round.state.record(stage)
    record.input_on_device = None
    if not specs:
        if isinstance(source, ActivationCache) and run.memory_plans[stage - 1].resident:
            rows = resident_rows(source, run.config, context.device, context.stop)
            record.input_on_device = rows is not None
            if rows is not None:
                return SourceLoader(RowNumbers(source), ranks, context.device, rows)
        return SourceLoader(source, ranks, context.device)
    records = [round.state.record(spec.stage) for spec in specs]
    formats = [OutputFormat.of(record.trained_with) for record in records]
    stages = trained_stages(specs, formats, load_stages(round.store, records))
    return RecomputingLoader(source, specs, stages, run.memory_plans[stage - 1].windows, context.device, ranks)


def _train(spec: StageSpec, loader: Loader, round: Round, context: RunContext) -> None:
    """Leaves the best weights in the stage's folder and the outcome in its record."""
    stage, run, record = spec.stage, round.run, round.state.record(spec.stage)
    record.status = "training"
    record.input, record.config = run.cache_plan.input_kind(stage), run.config
    round.save()
    key = round.training_key(stage)
    kind = SimultaneousTrainer if spec.parts else StageTrainer
    trainer = kind(spec, run.config, run.memory_plans[stage - 1], context)
    weights, progress = fit(trainer, loader, round)
    if context.ranks.first:
        save_arrays(round.store.weights(stage), weights, {"stage": str(stage), "made_for": key})
    weights_digest = digest(weights)
    if len(set(context.ranks.all_gather(weights_digest))) > 1:
        raise AssertionError(f"the ranks have trained different weights of stage {stage}")
    record.status = "caching"
    record.epochs, record.best_loss, record.seconds = progress.epoch, progress.best_loss, progress.seconds
    record.converged = progress.plateau_epochs >= run.config.training.patience
    record.train_peak_bytes, record.train_peak_by_kind = progress.peak_bytes, progress.peak_by_kind
    record.micro_batch = trainer.memory_plan.micro_batch  # smaller than planned where a step ran out of memory
    record.weights, record.fingerprint = weights_digest, fingerprint(key, weights_digest)
    round.save()


def _record_done(round: Round, record: StageRecord) -> None:
    record.status = "done"
    record.peak_bytes = max(record.train_peak_bytes or 0, record.cache_peak_bytes or 0)
    round.save()
    if not round.run.ranks.first:
        return
    if round.is_last and round.run.rounds > 1:
        round.store.checkpoint(record.stage).unlink(missing_ok=True)  # that of a run in one round is for more epochs
    if round.earlier:
        round.earlier.store.checkpoint(record.stage).unlink(missing_ok=True)


def _allocated(device: torch.device) -> int:
    """Bytes that CUDA's allocator has handed out; 0 on a CPU, where the meter alone counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _release_where_left(bytes_left: Callable[[], int], device: torch.device) -> None:
    """Gives free blocks back, and collects cycles of objects where bytes are left.

    Some modules, torch.fx's among them, are cycles that only the collector frees. It takes a third of a second, so it runs
    only where it has something to free.
    """
    return_free_blocks(device)
    if bytes_left() > 0:
        release(device)

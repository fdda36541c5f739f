"""One task from its input to its sealed cache; doing it twice does it once.

Whatever an earlier start has finished is found on the disk and kept: the best weights, the blocks of a half-written
cache, the sealed cache.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from layerwise.cache import ActivationCache
from layerwise.data.source import FrameSource
from layerwise.errors import BudgetError, UnusableCache
from layerwise.events import EpochDone, Event, Notify, StageDone
from layerwise.memory.device import cap, process_bytes, release, why_out_of_memory
from layerwise.memory.meter import AnyMeter, meter_for
from layerwise.memory.ranks import ALONE
from layerwise.run_store import StageRecord
from layerwise.training.cache_plan import below, input_kind
from layerwise.training.cache_retention import check_retained_caches, delete_unneeded_caches, mend, open_cache
from layerwise.training.checkpoint import digest, load_stages, save_arrays
from layerwise.training.fit import StageFiles, train_stage
from layerwise.training.forward import OutputFormat, trained_stages
from layerwise.training.loader import Loader, SourceLoader
from layerwise.training.memory_log import MemoryLog
from layerwise.training.recompute import RecomputingLoader
from layerwise.training.run import Run, fingerprint
from layerwise.training.samples import HELD_OUT, TRAIN, sample_classes
from layerwise.training.schedule import Task
from layerwise.training.spec import StageSpec
from layerwise.training.stage_cache import write_stage_cache, written_at


def perform(task: Task, run: Run) -> None:
    """Trains, caches and seals one stage, and records it in run.json; a cache that cannot be used is made anew, once.

    Raises Interrupted after saving.
    """
    mended: set[Path] = set()
    while True:
        try:
            check_retained_caches(run)
            for stage in range(1, task.stage + 1):  # those below are done, but for a cache that is to be made again
                _perform(stage, run)
            return
        except UnusableCache as error:
            if run.ranks.count > 1:  # the others have met nothing of it: at the next start it is missing for all
                error.path.unlink(missing_ok=True)
            if error.path in mended or run.ranks.count > 1:
                raise
            mended.add(error.path)
            mend(error, run)


def _perform(stage: int, run: Run) -> None:
    record = run.state.record(stage)
    if record.status == "done":
        return
    spec = run.specs[stage - 1]
    written_at(run.store.cache(stage), run)  # what is wrong with it is said before anything is trained
    source = _open_source(stage, run)
    cap(run.device, run.state.budget_bytes)  # anew: what the driver itself takes grows as kernels are loaded
    before = _allocated(run.device)
    meter = meter_for(run.device, run.state.budget_bytes)
    reason = None
    try:
        with meter, _recorded(stage, meter, run) as recorded:
            _train_and_cache(spec, source, replace(run, notify=recorded), record, meter)
    except (BudgetError, RuntimeError) as error:
        reason = why_out_of_memory(error)
    finally:
        if isinstance(source, ActivationCache):
            source.close()
    if reason is not None:  # raised out here: while the first error is known, so are the tensors of the attempt
        what = "cache its outputs" if record.status == "caching" else "train"
        raise BudgetError(f"Stage {stage} does not fit into the device budget to {what}. {reason}")
    left = _device_bytes_left(meter, run.device, before)
    _finish(run, record)
    delete_unneeded_caches(run)
    run.notify(
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
            round=run.round,
        )
    )


def _recorded(stage: int, meter: AnyMeter, run: Run) -> AbstractContextManager[Notify]:
    """Takes the events of a stage and passes them on; notes the memory of the first rank."""
    if run.ranks.first:
        return MemoryLog(run.store.memory(stage), meter, run.notify)
    return nullcontext(run.notify)


def _train_and_cache(spec: StageSpec, source: FrameSource, run: Run, record: StageRecord, meter: AnyMeter) -> None:
    loader = _feed(spec.stage, source, run)
    _train(spec, loader, run, record, meter)
    release(run.device)  # some modules, fx's among them, are cycles that only the collector frees
    _record_driver(run.device, record)
    meter.reset_peak()
    if run.storage.cached[spec.stage - 1] and not _is_read_by_nobody(spec, run):
        delete_unneeded_caches(run)
        write_stage_cache(spec, loader, run, record, meter)
        _record_driver(run.device, record)


def _is_read_by_nobody(spec: StageSpec, run: Run) -> bool:
    """The outputs of the last stage are for probes, which look at the last round."""
    return spec.stage == len(run.specs) and run.round < run.config.training.rounds


def _record_driver(device: torch.device, record: StageRecord) -> None:
    """On CUDA, what the allocator and the driver themselves report, beside the meter."""
    if device.type == "cuda":
        record.allocator_bytes = max(torch.cuda.max_memory_reserved(device), record.allocator_bytes or 0)
        record.driver_bytes = max(process_bytes(device), record.driver_bytes or 0)


def _open_source(stage: int, run: Run) -> FrameSource:
    """The data, or the nearest cache below."""
    below = run.storage.source(stage)
    return run.data if below == 0 else open_cache(below, run)


def _feed(stage: int, source: FrameSource, run: Run) -> Loader:
    """Reads the source, or passes it up through the stages that are not cached."""
    specs = below(run.specs, stage, run.storage)
    # The level of noise is that of all inputs of a batch.
    ranks = ALONE if run.config.training.input_noise else run.ranks
    if not specs:
        return SourceLoader(source, run.device, ranks)
    numbers = [spec.stage for spec in specs]
    handings = [OutputFormat.of(run.trained_with(below)) for below in numbers]
    stages = trained_stages(specs, handings, load_stages(run.store, numbers))
    return RecomputingLoader(source, specs, stages, run.layouts[stage - 1].windows, run.device, ranks)


def _train(spec: StageSpec, loader: Loader, run: Run, record: StageRecord, meter: AnyMeter) -> None:
    """Leaves the best weights in the stage's folder and the outcome in its record."""
    stage = spec.stage
    weights_path = run.store.weights(stage)
    if record.status == "caching" and weights_path.exists():
        return
    record.status = "training"
    record.input = input_kind(stage, run.storage)
    run.save()
    if run.ranks.first:
        run.store.write_stage_config(stage, run.config)

    def record_epoch(event: Event) -> None:
        if isinstance(event, EpochDone):
            record.epochs, record.train_peak_bytes = event.epoch, event.peak_bytes
            record.seconds += event.seconds
            record.best_loss = min(event.held_out_loss, math.inf if record.best_loss is None else record.best_loss)
            run.save()
        run.notify(event)

    trained = train_stage(
        spec,
        run.config,
        loader,
        train=np.flatnonzero(run.split == TRAIN),
        held_out=np.flatnonzero(run.split == HELD_OUT),
        classes=sample_classes(run.config, run.data),
        device=run.device,
        placement=run.layouts[stage - 1].placement,
        meter=meter,
        files=StageFiles(
            run.store.checkpoint(stage), run.store.metrics(stage), run.key(stage), _end_before(stage, run)
        ),
        stop=run.stop,
        notify=record_epoch,
        round=run.round,
        ranks=run.ranks,
    )
    if run.ranks.first:
        save_arrays(weights_path, trained.weights, {"stage": str(stage), "made_for": run.key(stage)})
    found = digest(trained.weights)
    if len(set(run.ranks.all(found))) > 1:
        raise AssertionError(f"the ranks have trained different weights of stage {stage}")
    record.status = "caching"
    record.epochs, record.converged, record.best_loss = trained.epochs, trained.converged, trained.best_loss
    record.train_peak_bytes = max(meter.peak, trained.peak_bytes)
    record.train_peak_by_kind = {str(kind): most for kind, most in meter.peak_by_kind.items()}
    record.micro_batch = trained.placement.micro_batch
    record.seconds = trained.seconds
    record.fingerprint = fingerprint(run.key(stage), found)
    run.save()


def _end_before(stage: int, run: Run) -> tuple[Path, str] | None:
    """The checkpoint that the round before has ended with, and what that was made for."""
    return (run.earlier.store.checkpoint(stage), run.earlier.key(stage)) if run.earlier else None


def _finish(run: Run, record: StageRecord) -> None:
    record.status = "done"
    record.peak_bytes = max(record.train_peak_bytes or 0, record.cache_peak_bytes or 0)
    run.save()
    if not run.ranks.first:
        return
    if run.round == run.config.training.rounds:
        run.store.checkpoint(record.stage).unlink(missing_ok=True)  # an earlier one is what the next round begins with
    if run.earlier:
        run.earlier.store.checkpoint(record.stage).unlink(missing_ok=True)


def _allocated(device: torch.device) -> int:
    """Bytes that CUDA's allocator has handed out; 0 on a CPU, where the meter alone counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _device_bytes_left(meter: AnyMeter, device: torch.device, before: int) -> int:
    """What the device holds of ours beyond the `before` bytes of allocator; anything is a defect and raises."""
    release(device)
    left = max(meter.live, _allocated(device) - before)
    if left:
        raise AssertionError(f"{left} bytes of the finished stage are still on the device")
    return left

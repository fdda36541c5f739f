"""One task from its input to its sealed cache; doing it twice does it once.

Whatever an earlier start has finished is found on the disk and kept: the best weights, the blocks of a half-written
cache, the sealed cache.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from layerwise.cache import ActivationCache, CacheWriter
from layerwise.cache.publishing import publish
from layerwise.cache.unsealed import cache_files
from layerwise.config import Config, load
from layerwise.data.source import DataSet, FrameSource
from layerwise.errors import BudgetError, ConfigError, Interrupted, RunError, UnusableCache
from layerwise.events import EpochDone, Event, Message, Notify, StageDone
from layerwise.files import write_atomically
from layerwise.memory.allocator import AnyMeter, meter_for
from layerwise.memory.device import cap, process_bytes, release, why_out_of_memory
from layerwise.memory.ranks import ALONE, Ranks
from layerwise.run_directory import RunPaths, RunState, StageRecord
from layerwise.stop import StopFlag
from layerwise.training.cache_layout import cache_layout
from layerwise.training.caching import cache_outputs, shortest_piece
from layerwise.training.checkpoint import digest, load_stage, load_stages, load_weights, save_arrays
from layerwise.training.classes import sample_classes
from layerwise.training.feed import Feed, ReadFeed
from layerwise.training.fingerprint import fingerprint, training_key
from layerwise.training.frozen import Handing, trained_stages
from layerwise.training.labels import frame_labels
from layerwise.training.memory_record import MemoryRecord
from layerwise.training.plan import StagePlan
from layerwise.training.planner import StageLayout
from layerwise.training.recomputed import RecomputedFeed
from layerwise.training.resume import find_what_is_missing
from layerwise.training.schedule import Task
from layerwise.training.split import HELD_OUT, TRAIN
from layerwise.training.stage import StageFiles, train_stage
from layerwise.training.stopping import stop_together
from layerwise.training.storage import Storage, below, input_of, keep_of_round, kept_caches


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that the tasks of one round share."""

    config: Config
    round: int
    """From 1; the last one is the run itself."""
    paths: RunPaths
    """Of this round, as `state` is."""
    state: RunState
    data: DataSet
    split: np.ndarray
    """uint8 [N], see training.split."""
    plans: list[StagePlan]
    layouts: list[StageLayout]
    storage: Storage
    device: torch.device
    stop: StopFlag
    notify: Notify
    earlier: "Run | None" = None
    """The round before."""
    ranks: Ranks = ALONE
    """Who performs its tasks together: each holds the same state, and the first one alone writes."""

    @property
    def keep(self) -> str:
        """Which caches stay once all stages are done; an earlier round has served its purpose by then."""
        return keep_of_round(self.config, self.round)

    def save(self) -> None:
        """Replaces run.json. Raises RunError."""
        if self.ranks.first:
            self.state.save(self.paths.state)

    def key(self, stage: int) -> str:
        """The training key of a stage whose lower stages are done, as is the stage itself in the round before."""
        below = self.state.record(stage - 1).fingerprint if stage > 1 else None
        if self.round > 1 and self.earlier is None:
            raise RunError(
                f"{self.paths.out} has lost the folder of its round {self.round - 1}; begin anew with --overwrite."
            )
        before = self.earlier.state.record(stage).fingerprint if self.earlier else None
        plan = self.plans[stage - 1]
        how = plan.optimization.identity if plan.optimization else None
        return training_key(self.config, self.data.identity, below, before, stage, plan.layers, how)

    def trained_with(self, stage: int) -> Config:
        """The options of a trained stage; where `--from-stage` has changed some, those below keep theirs."""
        return load(self.paths.stage_config(stage))


def perform(task: Task, run: Run) -> None:
    """Trains, caches and seals one stage, and records it in run.json; a cache that cannot be used is made anew, once.

    Raises Interrupted after saving.
    """
    mended: set[Path] = set()
    while True:
        try:
            check_kept(run)
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


def mend(error: UnusableCache, run: Run) -> None:
    """Deletes a cache that cannot be used, and has it made again. Raises RunError where it cannot be deleted."""
    run.notify(Message(f"{error} It is made again from below."))
    try:
        error.path.unlink(missing_ok=True)
    except OSError as failed:
        raise RunError(f"{error} Here it cannot be deleted: {failed.strerror}.") from None
    find_what_is_missing(run.state, run.paths, run.keep)
    run.save()


def _perform(stage: int, run: Run) -> None:
    record = run.state.record(stage)
    if record.status == "done":
        return
    plan = run.plans[stage - 1]
    _written_at(run.paths.cache(stage), run)  # what is wrong with it is said before anything is trained
    source = _open_source(stage, run)
    cap(run.device, run.state.budget_bytes)  # anew: what the driver itself takes grows as kernels are loaded
    before = _allocated(run.device)
    meter = meter_for(run.device, run.state.budget_bytes)
    reason = None
    try:
        with meter, _recorded(stage, meter, run) as recorded:
            _train_and_cache(plan, source, replace(run, notify=recorded), record, meter)
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
    delete_leftovers(run)
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
        return MemoryRecord(run.paths.memory(stage), meter, run.notify)
    return nullcontext(run.notify)


def _train_and_cache(plan: StagePlan, source: FrameSource, run: Run, record: StageRecord, meter: AnyMeter) -> None:
    feed = _feed(plan.stage, source, run)
    _train(plan, feed, run, record, meter)
    release(run.device)  # some modules, fx's among them, are cycles that only the collector frees
    _record_driver(run.device, record)
    meter.reset_peak()
    if run.storage.cached[plan.stage - 1] and not _is_read_by_nobody(plan, run):
        delete_leftovers(run)
        _cache(plan, feed, run, record, meter)
        _record_driver(run.device, record)


def _is_read_by_nobody(plan: StagePlan, run: Run) -> bool:
    """The outputs of the last stage are for probes, which look at the last round."""
    return plan.stage == len(run.plans) and run.round < run.config.training.rounds


def _record_driver(device: torch.device, record: StageRecord) -> None:
    """On CUDA, what the allocator and the driver themselves report, beside the meter."""
    if device.type == "cuda":
        record.allocator_bytes = max(torch.cuda.max_memory_reserved(device), record.allocator_bytes or 0)
        record.driver_bytes = max(process_bytes(device), record.driver_bytes or 0)


def _open_source(stage: int, run: Run) -> FrameSource:
    """The data, or the nearest cache below."""
    below = run.storage.source(stage)
    return run.data if below == 0 else _open_cache(below, run)


def _open_cache(stage: int, run: Run) -> ActivationCache:
    """Raises UnusableCache where it cannot be used, RunError where it is another run's."""
    cache = ActivationCache(run.paths.cache(stage))
    expected = run.state.record(stage).fingerprint
    if cache.layout.fingerprint != expected:
        cache.close()
        raise RunError(
            f"{cache.path} was not made by this run (its fingerprint is {cache.layout.fingerprint[:12]}, expected "
            f"{str(expected)[:12]}); retrain with --from-stage {stage}, or name another --cache-dir."
        )
    return cache


def _feed(stage: int, source: FrameSource, run: Run) -> Feed:
    """Reads the source, or passes it up through the stages that are not cached."""
    plans = below(run.plans, stage, run.storage)
    # The level of noise is that of all inputs of a batch.
    ranks = ALONE if run.config.training.input_noise else run.ranks
    if not plans:
        return ReadFeed(source, run.device, ranks)
    numbers = [plan.stage for plan in plans]
    handings = [Handing.of(run.trained_with(below)) for below in numbers]
    stages = trained_stages(plans, handings, load_stages(run.paths, numbers))
    return RecomputedFeed(source, plans, stages, run.layouts[stage - 1].windows, run.device, ranks)


def delete_leftovers(run: Run) -> None:
    """Frees what no stage reads or writes any more and --keep does not name, whatever a kill has left of it."""
    keep = kept_caches(run.state, run.keep)
    unsealed = {record.stage for record in run.state.stages if record.status == "caching"}
    left = [file for file in cache_files(run.paths.caches) if file.stage not in (keep if file.is_sealed else unsealed)]
    for record in run.state.stages:
        if record.stage in {file.stage for file in left if file.is_sealed}:
            record.cache = record.cache_bytes = None
    if left:
        run.save()
    for file in left if run.ranks.first else ():
        file.path.unlink(missing_ok=True)


def check_kept(run: Run) -> None:
    """Opens the caches that a run keeps of stages that are done; those of others are opened when they are used.

    Raises UnusableCache where one cannot be used.
    """
    for stage in kept_caches(run.state, run.keep):
        if run.state.record(stage).status == "done" and run.paths.cache(stage).exists():
            _open_cache(stage, run).close()


def _train(plan: StagePlan, feed: Feed, run: Run, record: StageRecord, meter: AnyMeter) -> None:
    """Leaves the best weights in the stage's folder and the outcome in its record."""
    stage = plan.stage
    weights_path = run.paths.weights(stage)
    if record.status == "caching" and weights_path.exists():
        return
    record.status = "training"
    record.input = input_of(stage, run.storage)
    run.save()
    if run.ranks.first:
        write_atomically(run.paths.stage_config(stage), run.config.to_toml().encode())

    def record_epoch(event: Event) -> None:
        if isinstance(event, EpochDone):
            record.epochs, record.train_peak_bytes = event.epoch, event.peak_bytes
            record.seconds += event.seconds
            record.best_loss = min(event.held_out_loss, math.inf if record.best_loss is None else record.best_loss)
            run.save()
        run.notify(event)

    trained = train_stage(
        plan,
        run.config,
        feed,
        train=np.flatnonzero(run.split == TRAIN),
        held_out=np.flatnonzero(run.split == HELD_OUT),
        classes=sample_classes(run.config, run.data),
        device=run.device,
        placement=run.layouts[stage - 1].placement,
        meter=meter,
        files=StageFiles(
            run.paths.checkpoint(stage), run.paths.metrics(stage), run.key(stage), _end_before(stage, run)
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
    record.train_peak_by_kind = dict(meter.peak_by_kind)
    record.micro_batch = trained.placement.micro_batch
    record.seconds = trained.seconds
    record.fingerprint = fingerprint(run.key(stage), found)
    run.save()


def _end_before(stage: int, run: Run) -> tuple[Path, str] | None:
    """The checkpoint that the round before has ended with, and what that was made for."""
    return (run.earlier.paths.checkpoint(stage), run.earlier.key(stage)) if run.earlier else None


def _cache(plan: StagePlan, feed: Feed, run: Run, record: StageRecord, meter: AnyMeter) -> None:
    """Leaves the sealed cache, and its peak and size in the record."""
    path = run.paths.cache(plan.stage)
    written = _written_at(path, run)
    if written != path:
        _discard_others(written, record.fingerprint)
    if not _is_sealed(path, record.fingerprint) and not _is_sealed(written, record.fingerprint):
        module = plan.build_module(run.config.training.seed, run.device)
        load_weights(module, load_stage(run.paths, plan.stage))
        meter.label("parameters", module.state_dict().values())
        started, seconds = time.monotonic(), record.seconds

        def record_progress() -> None:
            record.cache_peak_bytes = max(meter.peak, record.cache_peak_bytes or 0)
            record.seconds = seconds + time.monotonic() - started
            run.save()

        options, ranks, trained_with = run.config.cache, run.ranks, run.trained_with(plan.stage)
        layout = cache_layout(plan, run.data, trained_with.cache.dtype, run.split, str(record.fingerprint))

        def open_writer() -> CacheWriter:
            return CacheWriter(written, layout, int(options.block), options.compression, ranks.rank, ranks.count)

        def write(piece: int) -> None:
            with open_writer() as writer:
                try:
                    precision = trained_with.training.precision
                    cache_outputs(module, feed, writer, piece, precision, run.device, meter, run.stop, run.notify)
                finally:
                    record_progress()
                if ranks.count == 1:
                    seal(writer)
                else:
                    writer.finish()

        def seal(writer: CacheWriter) -> None:
            _put_frame_labels(writer, plan, run.data)
            writer.seal(lambda: run.stop.raise_if_set(f"while the cache of stage {plan.stage} was packed"))

        def write_in_pieces() -> None:
            _in_pieces_that_fit(write, run.layouts[plan.stage - 1].piece, shortest_piece(plan, run.config), run.device)

        if ranks.count == 1:
            write_in_pieces()
        else:
            _write_together(open_writer, write_in_pieces, seal, run, f"in the cache of stage {plan.stage}")
    if written.exists() and written != path:
        publish(written, path, lambda: run.stop.raise_if_set(f"while the cache of stage {plan.stage} was copied"))
        with suppress(OSError):
            written.parent.rmdir()  # unless another stage is written there
    record.cache, record.cache_bytes = str(path), path.stat().st_size


def _written_at(path: Path, run: Run) -> Path:
    """Where the cache is written: in its place, or on a faster disk. Raises ConfigError where that is not known here."""
    scratch = run.config.cache.scratch
    if scratch is None:
        return path
    folder = os.path.expandvars(scratch)
    if "$" in folder:
        raise ConfigError(f"cache.scratch {scratch}: the variable is not set on this machine; name a folder.")
    return Path(folder).expanduser() / f"layerwise-{run.state.run_id}" / path.name


def _discard_others(written: Path, fingerprint: str | None) -> None:
    """Deletes what an earlier training of the stage has left on the faster disk."""
    if not written.exists():
        return
    try:
        with ActivationCache(written) as cache:
            stale = cache.layout.fingerprint != fingerprint
    except UnusableCache:
        stale = True
    if stale:
        written.unlink()


def _write_together(
    open_writer: Callable[[], CacheWriter],
    write: Callable[[], None],
    seal: Callable[[CacheWriter], None],
    run: Run,
    where: str,
) -> None:
    """Each rank writes its span of the cache, and the first one seals it. Raises Interrupted on all where one was asked."""

    def create() -> None:
        with open_writer():
            pass

    def complete() -> None:
        with open_writer() as writer:
            seal(writer)

    run.ranks.wait_for_first(create)
    with suppress(Interrupted):  # the others are told of it below
        write()
    stop_together(run.stop, run.ranks, where)
    run.ranks.wait_for_first(complete)


def _in_pieces_that_fit(write: Callable[[int], None], piece: int, shortest: int, device: torch.device) -> None:
    """Writes in pieces of `piece` frames, and goes on in shorter ones where the device runs out of memory."""
    while True:
        try:
            write(piece)
            return
        except (BudgetError, RuntimeError) as error:
            reason = why_out_of_memory(error)
        if piece == shortest:
            raise BudgetError(reason)
        piece = max(piece // 2, shortest)
        release(device)


def _is_sealed(path: Path, expected: str | None) -> bool:
    if not path.exists():
        return False
    with ActivationCache(path) as cache:
        if cache.layout.fingerprint == expected:
            return True
    raise RunError(f"{path} holds another run's activations; move it away, or name another --cache-dir.")


def _finish(run: Run, record: StageRecord) -> None:
    record.status = "done"
    record.peak_bytes = max(record.train_peak_bytes or 0, record.cache_peak_bytes or 0)
    run.save()
    if not run.ranks.first:
        return
    if run.round == run.config.training.rounds:
        run.paths.checkpoint(record.stage).unlink(missing_ok=True)  # an earlier one is what the next round begins with
    if run.earlier:
        run.earlier.paths.checkpoint(record.stage).unlink(missing_ok=True)


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


def _put_frame_labels(writer: CacheWriter, plan: StagePlan, data: DataSet) -> None:
    for name in data.frame_label_names:
        for sample, length in enumerate(plan.output_lengths.tolist()):
            writer.put_frame_labels(name, sample, frame_labels(name, plan, data, sample, np.arange(length)))

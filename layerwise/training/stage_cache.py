"""The sealed cache of a trained stage: written in pieces that fit, by all ranks, in its place or on a faster disk first.

What an earlier start has written of it is found on the disk and kept.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from layerwise.cache import ActivationCache, CacheWriter
from layerwise.cache.inventory import publish
from layerwise.data.batches import Group, group_renderings
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError, Interrupted, UnusableCache
from layerwise.events import CachingProgress
from layerwise.memory.device import halve_until_it_fits, once_more_where_full
from layerwise.training.cache_plan import cache_layout
from layerwise.training.checkpoint import load_stages, load_weights
from layerwise.training.context import RunContext
from layerwise.training.forward import InferenceStage, OutputFormat, forward_all, shortest_piece, to_host
from layerwise.training.loader import Loader
from layerwise.training.overlapped import overlapped_rows
from layerwise.training.run import Round
from layerwise.training.spec import StageSpec, frame_labels


def write_stage_cache(spec: StageSpec, loader: Loader, round: Round, context: RunContext) -> None:
    """Leaves the sealed cache, and its peak and size in the record."""
    run, record, meter = round.run, round.state.record(spec.stage), context.meter
    path = round.store.cache(spec.stage)
    written = written_at(path, round)
    if written != path:
        _discard_others(written, record.fingerprint)
    if not _is_sealed(path, record.fingerprint) and not _is_sealed(written, record.fingerprint):
        # --from-stage may have changed the options since, for the stages above.
        options, ranks, trained_with = run.config.cache, run.ranks, record.trained_with
        module = spec.build_module(run.config.training.seed, run.device)
        load_weights(module, load_stages(round.store, [record]))
        meter.label("parameters", module.state_dict().values())
        stage = InferenceStage(spec.stage, module.eval(), OutputFormat.of(trained_with), resident=True)
        started, seconds = time.monotonic(), record.seconds

        def record_progress() -> None:
            record.cache_peak_bytes = max(meter.peak, record.cache_peak_bytes or 0)
            record.seconds = seconds + time.monotonic() - started
            round.save()

        layout = cache_layout(spec, run.data, trained_with.cache.dtype, run.split, str(record.fingerprint))

        def open_writer() -> CacheWriter:
            return CacheWriter(written, layout, int(options.block), options.compression, ranks.rank, ranks.count)

        memory_plan = run.memory_plans[spec.stage - 1]
        overlapped = iter([memory_plan.overlapped])

        def write(piece: int) -> None:
            with open_writer() as writer:
                try:
                    _write_outputs(stage, loader, writer, piece, next(overlapped, False), context)
                finally:
                    record_progress()
                if ranks.count == 1:
                    seal(writer)
                else:
                    writer.finish()

        def seal(writer: CacheWriter) -> None:
            _put_frame_labels(writer, spec, run.data)
            writer.seal(lambda: context.stop.raise_if_set(f"while the cache of stage {spec.stage} was packed"))

        def write_in_pieces() -> None:
            first = iter([memory_plan.overlapped])

            def attempt(piece: int) -> None:
                if next(first, False):  # the second time it is not overlapped: that takes less
                    once_more_where_full(partial(write, piece), run.device)
                else:
                    write(piece)

            halve_until_it_fits(attempt, memory_plan.piece, shortest_piece(spec, run.config), run.device)

        if ranks.count == 1:
            write_in_pieces()
        else:
            _write_together(open_writer, write_in_pieces, seal, context, f"in the cache of stage {spec.stage}")
    if written.exists() and written != path:
        publish(written, path, lambda: context.stop.raise_if_set(f"while the cache of stage {spec.stage} was copied"))
        with suppress(OSError):
            written.parent.rmdir()  # unless another stage is written there
    record.cache, record.cache_bytes = path.name, path.stat().st_size


def _write_outputs(
    stage: InferenceStage, loader: Loader, writer: CacheWriter, piece: int, overlapped: bool, context: RunContext
) -> None:
    """Writes what the writer lacks. Raises Interrupted between two pieces; what is written so far stays.

    Writers that share a cache go through the groups of the whole of it, each through those that its rows are in: the values
    are those of one writer to the bit.
    """
    layout, meter = writer.layout, context.meter
    rows_done, rows_stop = writer.rows_done, writer.rows_stop
    groups = group_renderings(loader.lengths, piece, layout.views) if rows_done < rows_stop else []
    missing = [
        group for group in groups if layout.offsets[group.stop] > rows_done and layout.offsets[group.first] < rows_stop
    ]
    row = int(layout.offsets[missing[0].first]) if missing else 0
    outputs = overlapped_rows if overlapped else _rows_one_by_one
    for rows in outputs(stage, loader, missing, context):
        writer.write(rows[max(rows_done - row, 0) : max(rows_stop - row, 0)])
        row += len(rows)
        context.notify(CachingProgress(layout.stage, min(row, rows_stop), rows_stop, meter.live, meter.peak))
        context.stop.raise_if_set(f"in the cache of stage {layout.stage}, after row {row}")


def _rows_one_by_one(
    stage: InferenceStage, loader: Loader, groups: Sequence[Group], context: RunContext
) -> Iterator[np.ndarray]:
    """Each rendering's, as `as_array` gives them."""
    passed = forward_all([stage], loader, groups, lambda number, rendering, outputs: to_host(outputs), context)
    return (rows for _, rows, _ in passed)


def written_at(path: Path, round: Round) -> Path:
    """Where the cache is written: in its place, or on a faster disk. Raises ConfigError where that is not known here."""
    scratch = round.run.config.cache.scratch
    if scratch is None:
        return path
    folder = os.path.expandvars(scratch)
    if "$" in folder:
        raise ConfigError(f"cache.scratch {scratch}: the variable is not set on this machine; name a folder.")
    return Path(folder).expanduser() / f"layerwise-{round.state.run_id}" / path.name


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
    context: RunContext,
    where: str,
) -> None:
    """Each rank writes its span of the cache, and the first one seals it. Raises Interrupted on all where one was asked."""

    def create() -> None:
        with open_writer():
            pass

    def complete() -> None:
        with open_writer() as writer:
            seal(writer)

    context.ranks.wait_for_first(create)
    with suppress(Interrupted):  # the others are told of it below
        write()
    context.raise_if_stopped(where)
    context.ranks.wait_for_first(complete)


def _is_sealed(path: Path, fingerprint: str | None) -> bool:
    """Raises CacheError where it is another run's."""
    if path.exists():
        ActivationCache(path, str(fingerprint)).close()
    return path.exists()


def _put_frame_labels(writer: CacheWriter, spec: StageSpec, data: DataSet) -> None:
    for name in data.frame_label_names:
        for sample, length in enumerate(spec.output_lengths.tolist()):
            writer.put_frame_labels(name, sample, frame_labels(name, spec, data, sample, np.arange(length)))

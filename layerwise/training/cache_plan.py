"""Which stages' outputs are cached, under the room that the disk has, and which are recomputed from a cache below.

What a cache holds besides activations is known before its stage is trained, so the size of its file is known too."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from layerwise.cache import Layout
from layerwise.cache.format import file_bytes
from layerwise.cache.layout import as_codes, in_chains
from layerwise.cache.packing import packed, packed_bytes
from layerwise.cache.zstd import require_zstandard
from layerwise.config import CacheOptions, Config
from layerwise.data.source import DataSet
from layerwise.errors import BudgetError, ConfigError
from layerwise.run_store import RunState, RunStore, StageRecord, cache_files
from layerwise.training.spec import StageSpec, frame_labels
from layerwise.units import size


@dataclass(frozen=True, slots=True)
class CachePlan:
    """For each stage, from 1, whether its outputs are cached."""

    cached: tuple[bool, ...]
    notes: tuple[str, ...] = ()
    """What is not cached, why, and what it costs."""

    @staticmethod
    def of(records: Sequence[StageRecord]) -> "CachePlan":
        """As the records of a run's stages say."""
        return CachePlan(tuple(bool(record.cached) for record in records))

    def source(self, stage: int) -> int:
        """The stage whose cache is the nearest below `stage`; 0 for the data."""
        return next((below for below in range(stage - 1, 0, -1) if self.cached[below - 1]), 0)

    def below(self, stage: int, specs: Sequence[StageSpec]) -> tuple[StageSpec, ...]:
        """The stages that are recomputed for the input of `stage`, lowest first. specs: all stages of the run."""
        return tuple(specs[self.source(stage) : stage - 1])

    def input_kind(self, stage: int) -> Literal["data", "cache", "recompute"]:
        """Where the samples of a stage come from: data, cache or recompute."""
        if stage == 1:
            return "data"
        return "cache" if self.cached[stage - 2] else "recompute"

    def kept(self, stage: int, keep: str) -> set[int]:
        """The stages whose caches stay once `stage` is done."""
        if keep == "all":
            return set(range(1, stage + 1))
        if keep == "nothing":
            return set()
        newest = self.source(stage + 1)
        # A damaged cache is made again from the one below it.
        return {newest, self.source(newest)} if keep == "needed" and newest else {newest}


def rounds_under_way(config: Config, stages: int) -> int:
    """Rounds that may hold caches at once. The number of processes plays no part: what is cached acts on the last bits."""
    return min(config.training.rounds, stages)


def retained_caches(state: RunState, keep: str) -> set[int]:
    """The stages whose caches stay: those that --keep names, those that are being written, and the inputs of all others."""
    plan = CachePlan.of(state.stages)
    newest = max((record.stage for record in state.stages if record.status in ("caching", "done")), default=0)
    inputs = {plan.source(record.stage) for record in state.stages if record.status != "done"}
    written = {record.stage for record in state.stages if record.status == "caching"}
    stay = plan.kept(newest, keep) | inputs | written if newest else set()
    return {stage for stage in stay if stage and plan.cached[stage - 1]}


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes that the cache of a stage takes; how much compression saves is not known before."""

    activations: int
    file: int
    """Most that it takes once it is sealed."""
    written: int
    """Most that it takes until then: packing it makes another whole file."""


def cache_sizes(specs: Sequence[StageSpec], data: DataSet, options: CacheOptions) -> list[CacheSize]:
    """Of every stage, whether or not it is to be cached. Raises CacheError where a label cannot be stored."""
    sizes = []
    for spec in specs:
        layout = cache_layout_without_labels(spec, data, options.dtype)
        raw = file_bytes(layout)
        compressed = options.compression != "none" and packed(layout) != layout
        more = packed_bytes(packed(layout)) if compressed else 0
        sizes.append(CacheSize(layout.activation_bytes, max(raw, more), raw + more))
    return sizes


def free_for_caches(folder: Path) -> int:
    """Bytes that are free on the disk of a run's caches, those that it holds there already included."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    ours = sum(file.bytes for each in (folder, *folder.glob("round-*")) for file in cache_files(each))
    return shutil.disk_usage(there).free + ours


def sealed_bytes(paths: RunStore) -> dict[int, int]:
    """Stages that have a sealed cache, to the bytes that it takes on the disk."""
    return {file.stage: file.bytes for file in cache_files(paths.caches) if file.is_sealed}


def plan_caches(
    config: Config,
    specs: Sequence[StageSpec],
    data: DataSet,
    free: int,
    decided: Sequence[bool] = (),
    sealed: Mapping[int, int] | None = None,
    intended: Sequence[bool | None] = (),
) -> CachePlan:
    """Caches every stage whose outputs find room beside those that must stay meanwhile; the rest is recomputed.

    free: bytes on the disk of the caches, those of this run included; decided: what earlier starts did with the first
    stages; sealed: bytes of their caches, by stage, where they are known; intended: what an earlier start meant to do with
    each stage, which is done unless it finds no room any more, for recomputed inputs differ in their last bits.
    Raises BudgetError where a cache that is needed finds no room, ConfigError where one cannot be done without, CacheError
    where zstandard is needed and not installed.
    """
    options = config.cache
    if options.compression != "none" and options.policy != "never":
        require_zstandard()
    under_way = rounds_under_way(config, len(specs))
    known = {stage: taken for stage, taken in (sealed or {}).items() if stage <= len(decided)}
    room = (free if options.disk is None else min(options.disk, free)) // under_way
    cached, notes = list(decided), []
    sizes = [
        replace(each, file=known.get(stage, each.file))
        for stage, each in enumerate(cache_sizes(specs, data, options), start=1)
    ]
    _check_decided(options, sizes, CachePlan(tuple(cached)), known)
    for spec in specs[len(decided) :]:
        so_far, needed = CachePlan(tuple(cached)), sizes[spec.stage - 1].written
        beside = _beside(options, sizes, so_far, spec.stage)
        fits = beside + needed <= room
        before = intended[spec.stage - 1] if spec.stage <= len(intended) else None
        wanted = options.policy != "never" and fits and before is not False
        cached.append(wanted)
        if wanted:
            continue
        no_room, more_room = _no_room(spec, needed, beside, room, options, under_way), _more_room(options, beside)
        if options.policy == "always" and not fits:
            raise BudgetError(f"{no_room}. {more_room}, or let what does not fit be recomputed: --cache auto.")
        if before:
            notes.append(f"an earlier start was to cache the outputs of stage {spec.stage}; they find no room any more")
        if spec.stage == len(specs):
            notes.append(f"the outputs of stage {spec.stage}, {size(needed)}, are not cached; probes recompute them")
            continue
        _check_recomputable(spec, options, no_room, more_room)
        why = "as an earlier start decided" if fits else f"{size(needed)} find no room"
        notes.append(_cost(specs, spec.stage, so_far, "--cache never" if options.policy == "never" else why))
    if options.compression != "none" and any(cached):
        notes.append("while a cache is packed it lies on the disk twice; what it shrinks to is not known before")
    return CachePlan(tuple(cached), tuple(notes))


def _check_decided(
    options: CacheOptions, sizes: Sequence[CacheSize], decided: CachePlan, sealed: Mapping[int, int]
) -> None:
    """Raises BudgetError where the caches of the stages that are trained take more than `--disk`."""
    stage = len(decided.cached)
    if options.disk is None or not stage:
        return
    if decided.cached[-1] and stage not in sealed:
        taken = _beside(options, sizes, decided, stage) + sizes[stage - 1].written
    else:
        taken = sum(sealed.get(kept, 0) for kept in decided.kept(stage, options.keep))
    if taken > options.disk:
        raise BudgetError(
            f"--disk {size(options.disk)} does not hold the caches of the stages that are trained already, {size(taken)}. "
            f"Give more, or keep fewer with --keep needed, or retrain with --from-stage {stage} or below, which decides "
            "anew what is cached."
        )


def _check_recomputable(spec: StageSpec, options: CacheOptions, no_room: str, more_room: str) -> None:
    """Raises ConfigError or BudgetError where what is not cached cannot be recomputed to the same values."""
    if spec.shapes.recurrent:
        why = f"stage {spec.stage} has a recurrent layer, so its outputs cannot be recomputed window by window"
        instead = "a cut in which it is in the last stage"
    elif options.dtype == "int8":
        why = "with cache.dtype int8 outputs are rounded a thousand rows at a time, and cannot be recomputed window by window"
        instead = "--cache-dtype float16"
    else:
        return
    if options.policy == "never":
        raise ConfigError(f"--cache never: {why}; give --cache auto, or {instead}.")
    raise BudgetError(f"{no_room}; {why}. {more_room}, or {instead}.")


def disk_peak(options: CacheOptions, sizes: Sequence[CacheSize], plan: CachePlan) -> int:
    """Most bytes that the caches take at once."""
    stages = (stage for stage, cached in enumerate(plan.cached, start=1) if cached)
    return max((_beside(options, sizes, plan, stage) + sizes[stage - 1].written for stage in stages), default=0)


def _beside(options: CacheOptions, sizes: Sequence[CacheSize], plan: CachePlan, stage: int) -> int:
    """Bytes of the caches that must be there while that of `stage` is written."""
    source = plan.source(stage)
    there = range(1, stage) if options.keep == "all" else [source] if source else []
    return sum(sizes[below - 1].file for below in there if plan.cached[below - 1])


def _no_room(spec: StageSpec, needed: int, beside: int, room: int, options: CacheOptions, under_way: int) -> str:
    whole = room * under_way
    what = f"{size(whole)} of free disk"
    if options.disk is not None and whole > options.disk - under_way:
        what = f"--disk {size(options.disk)}"
    if under_way > 1:
        what += f", shared by the {under_way} rounds that may be under way at once,"
    others = f" beside the {size(beside)} that must stay" if beside else ""
    packing = " while it is packed" if options.compression != "none" else ""
    return f"{what} does not hold the cache of stage {spec.stage}, {size(needed)}{packing}{others}"


def _more_room(options: CacheOptions, beside: int) -> str:
    """What a user can do for a cache to fit."""
    ways = ["Give more room"]
    if options.dtype == "float32":
        ways.append("--cache-dtype float16")
    if options.keep == "all" and beside:
        ways.append("--keep needed")
    return ", ".join(ways)


def _cost(specs: Sequence[StageSpec], stage: int, lower: CachePlan, why: str) -> str:
    """What it costs that a stage is not cached. lower: the plan of the stages below it."""
    source, above = lower.source(stage), specs[stage]
    origin = f"the cache of stage {source}" if source else "the data"
    frames, extra = above.window.frames, 0
    stop, start = frames, 0
    for spec in reversed(specs[source:stage]):
        start, stop = spec.shapes.inputs_of(start, stop)
        extra += _forward_flops(spec, stop - start)
    # A backward pass costs about twice the forward pass.
    more = extra / max(3 * _forward_flops(above, frames), 1)
    return (
        f"the outputs of stage {stage} are not cached ({why}): stage {stage + 1} recomputes them from {origin}, which adds "
        f"{more:.0%} to the products of a step"
    )


def _forward_flops(spec: StageSpec, frames: int) -> int:
    """Products of the forward pass of one window."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        spec.shapes(torch.empty(1, frames, *spec.frame_shape, device="meta"), np.array([frames]))
    return counter.get_total_flops()


def is_last(spec: StageSpec) -> bool:
    """Whether no stage reads its outputs."""
    return spec.layers.stop == len(spec.network.layers)


def cache_layout_without_labels(spec: StageSpec, data: DataSet, dtype: str) -> Layout:
    """Without what is not known yet, or takes long to find out and no room. Raises CacheError."""
    labels = {name: as_codes(values) for name, values in data.labels.items()}
    layout = Layout(
        fingerprint="",
        stage=spec.stage,
        dtype=dtype,
        frame_shape=spec.output_shape,
        columns=data.columns,
        views=1 if is_last(spec) else data.views,  # no stage is trained on its outputs, and probes read view 0
        lengths=spec.output_lengths,
        ids=tuple(data.ids),
        split=np.zeros(len(data.ids), dtype=np.uint8),
        labels={name: codes for name, (codes, _) in labels.items()},
        labels_classes={name: classes for name, (_, classes) in labels.items()},
        frame_labels_classes=dict.fromkeys(data.frame_label_names, ()),
        hop=spec.geometry.hop,
        offset=spec.geometry.offset,
    )
    return in_chains(layout)


def cache_layout(spec: StageSpec, data: DataSet, dtype: str, split: np.ndarray, fingerprint: str) -> Layout:
    """All of it. The labels of the frames are gone through sample by sample: there may be more than memory holds."""
    classes = {name: _classes(name, spec, data) for name in data.frame_label_names}
    planned = cache_layout_without_labels(spec, data, dtype)
    return replace(planned, split=split, fingerprint=fingerprint, frame_labels_classes=classes)


def _classes(name: str, spec: StageSpec, data: DataSet) -> tuple[str, ...]:
    found: set[str] = set()
    for sample, length in enumerate(spec.output_lengths.tolist()):
        found.update(np.unique(frame_labels(name, spec, data, sample, np.arange(length))).tolist())
    return tuple(sorted(found))

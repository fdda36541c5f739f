"""The stages of a run, worked out before anything is trained: what each reads, builds and puts out."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from layerwise.config import Config
from layerwise.data.batches import Window
from layerwise.data.source import DataSet
from layerwise.errors import ConfigError, DataError
from layerwise.memory.device import keep_recurrence_in_float32
from layerwise.memory.meter import first_backward_pass, uncounted
from layerwise.memory.ranks import Ranks
from layerwise.nets import shortest_window
from layerwise.nets.alike import Alike, alike, layer_traits
from layerwise.nets.batch_effects import BatchEffects, module_effects
from layerwise.nets.module import Geometry, Module
from layerwise.nets.network import Network, weight_seed, with_first_weights, without_values
from layerwise.nets.receptive_field import rows_between, rows_seen
from layerwise.objectives import (
    Scored,
    build_objective,
    check_objective,
    predicts_rows,
    renderings_compared,
    sees_cells,
)
from layerwise.objectives.protocol import ObjectiveModule
from layerwise.training.optimizer import Optimization
from layerwise.training.samples import count_classes


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class StageSpec:
    """One stage, described and not yet built."""

    stage: int
    layers: range
    """Its layers in the whole network."""
    network: Network
    frame_shape: tuple[int, ...]
    """Of its input."""
    target_channels: int
    """Channels of the vectors that the objective scores against the outputs."""
    output_shape: tuple[int, ...]
    """Frame shape of its output, channels first."""
    classes: int
    """Of the label that the objective learns; 0 where it learns none."""
    parameters: int
    """Of the module, without those of the objective."""
    renderings: int
    """Neighbouring windows of a batch that show one sample in different views."""
    window: Window
    """Of its input."""
    lengths: np.ndarray
    """int64 [N], frames of each sample of its input."""
    output_lengths: np.ndarray
    """int64 [N], frames of each sample of its output."""
    geometry: Geometry
    """Of its output."""
    alike: Alike
    """The same for stages that take the same on the device, so that predictions are memoised once for all of them."""
    views: int = 1
    """Renderings of each sample of its input."""
    cells: tuple[int, ...] = ()
    """Of an output frame, along each axis behind the channels, whose means the objective scores; none: one mean of it all."""
    rows_between: int = 0
    """Least rows of cells between a context and its target."""
    parts: tuple["StageSpec", ...] = ()
    """Where the stage is several modules that are trained at once, each by its own objective: these."""
    optimization: Optimization | None = None
    """An optimizer of the user's in place of Adam."""

    @property
    def shapes(self) -> Module:
        """The module without values, shared by all who ask."""
        return without_values(self.network, self.layers)

    def vectors(self, frames: Any) -> Any:
        """What the objective may score of so many input frames (an int, or int64 [N])."""
        scored = self.shapes.out_length(frames) * math.prod(self.cells)
        return int(scored) if isinstance(frames, int) else scored

    @property
    def vector_columns(self) -> int:
        """Of these, how many lie in a row."""
        return math.prod(self.cells[1:]) if self.cells else self.window.columns

    def build_module(self, seed: int, device: torch.device) -> Module:
        """The module with its first weights, on the device."""
        module = self.network.build(self.layers, seed, device)
        keep_recurrence_in_float32(module)
        return module

    def build_objective(self, config: Config, device: torch.device) -> ObjectiveModule:
        """The objective with its first weights, on the device."""
        shared = self.shapes.targets_are_outputs
        channels = self.target_channels, self.output_shape[0]
        scored = Scored(*channels, self.classes, shared, math.prod(self.cells), self.rows_between)
        build = partial(build_objective, config.objective, scored)
        return with_first_weights(build, weight_seed(config.training.seed, self.stage, 1), device)


def stage_specs(
    config: Config, data: DataSet, network: Network, cut: Sequence[range], optimization: Optimization | None = None
) -> list[StageSpec]:
    """The stages of a network that is cut into these ranges of layers, in order. optimization: in place of Adam.

    Raises ConfigError where the network, the cut or the window do not fit the data, DataError where a sample is too short.
    """
    if sum(map(len, cut)) != len(network.layers):
        raise ConfigError(f"A cut of {sum(map(len, cut))} layers does not fit this network of {len(network.layers)}.")
    window = input_window(config, data)
    if network.reads_ids:
        _keep_ids(data)
    check_objective(config.objective.name)
    renderings = renderings_compared(config.objective.name)
    _check_renderings(config, data, renderings)
    classes = count_classes(config, data)
    frame_shape, lengths, geometry = data.frame_shape, data.lengths, Geometry()
    compared, stages = _Compared(config), []
    for stage, layers in enumerate(cut, start=1):
        module = without_values(network, layers)
        # Shapes do not depend on the length, and a GRU takes its time on every frame even without values.
        frames = next(count for count in itertools.count(1) if module.out_length(count) >= 1)
        _check_trainable(stage, layers, module)
        targets, outputs = _shapes(module, torch.empty(1, frames, *frame_shape, device="meta"))
        output_lengths = module.out_length(lengths)
        _check_lengths(stage, output_lengths, data)
        geometry = module.geometry(geometry)
        cells, between = compared.of_stage(network, layers, frame_shape, tuple(outputs.shape[2:]))
        behind = Window(int(module.out_length(window.rows)), window.columns)
        if config.data.frames == "steps" and predicts_rows(config.objective.name):
            between = _rows_of_gap(config, stage, geometry, behind.rows)
        stages.append(
            StageSpec(
                stage=stage,
                layers=layers,
                network=network,
                frame_shape=frame_shape,
                target_channels=targets.shape[2],
                output_shape=tuple(outputs.shape[2:]),
                classes=classes,
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                renderings=renderings,
                window=window,
                lengths=lengths,
                output_lengths=output_lengths,
                geometry=geometry,
                alike=alike(
                    network,
                    *(layer_traits(network, index) for index in layers),
                    *(
                        stage == 1,
                        frame_shape,
                        window,
                        int(lengths.min()),
                        int(lengths.max()),
                        classes,
                        renderings,
                        cells,
                        between,
                        optimization,
                    ),
                ),
                views=data.views,
                cells=cells,
                rows_between=between,
                optimization=optimization,
            )
        )
        window, frame_shape, lengths = behind, tuple(outputs.shape[2:]), output_lengths
    compared.check_pairs()
    if not compared.wanted:
        _check_rows(config, window.rows, int(data.lengths.max()))
    return stages


def input_window(config: Config, data: DataSet) -> Window:
    """The window that stage 1 reads: steps of a sequence, a sub-grid of the patches of a picture, or a whole sample.

    No longer than the longest sequence: nothing is to be laid out for frames that there never are. Raises ConfigError.
    """
    _check_net(config, data)
    if config.data.frames == "whole":
        return Window(1, 1)
    if config.data.frames == "steps":
        return Window(min(config.data.window, int(data.lengths.max())), 1)
    options = config.data
    side = (options.crop - options.patch) // options.patch_stride + 1
    if options.crop < options.patch or (options.crop - options.patch) % options.patch_stride or side > data.columns:
        raise ConfigError(
            f"data.crop {options.crop}: a crop must be the patch of {options.patch} pixels plus a multiple of "
            f"data.patch_stride {options.patch_stride}, and at most the picture of {options.picture} pixels."
        )
    return Window(side, side)


def _check_net(config: Config, data: DataSet) -> None:
    """Raises ConfigError where a network of ours is to read what it was not made for."""
    net, shape = config.net.name, " x ".join(map(str, data.frame_shape))
    if net == "speech" and (data.columns != 1 or len(data.frame_shape) != 1):
        raise ConfigError(
            f"--net speech trains on recordings and other sequences of steps, and these frames are of {shape}; for pictures "
            "give --net vision, for others a --net of your own."
        )
    if net == "vision" and (data.columns == 1 or len(data.frame_shape) != 3):
        raise ConfigError(
            f"--net vision trains on pictures in patches, and these frames are of {shape}; name pictures with --data "
            "images:FOLDER, cifar10:FOLDER or stl10:FOLDER, for recordings give --net speech, for others a --net of your own."
        )
    if net == "convnet" and (
        config.data.frames != "whole" or len(data.frame_shape) != 3 or min(data.frame_shape[1:]) < 10
    ):
        raise ConfigError(
            f"--net convnet trains on whole pictures of 10 x 10 pixels or more, and these frames are of {shape}; give --frames "
            "whole and larger pictures, or another --net."
        )


def _keep_ids(data: DataSet) -> None:
    """Whole numbers that stand for something are not brought to a level. Raises ConfigError where they would be changed."""
    if data.takes != "arrays":
        raise ConfigError(f"This network reads whole numbers, such as those of words, and the data are {data.takes}.")
    if data.views > 1:
        raise ConfigError(
            "This network reads whole numbers, such as those of words, which cannot be rendered in several views; give "
            "--views 1 and an objective that compares frames, such as --frames steps with --objective infonce."
        )
    data.level = 1.0


def _check_renderings(config: Config, data: DataSet, renderings: int) -> None:
    name, size = config.objective.name, config.training.batch_size
    if renderings > data.views:
        raise ConfigError(
            f"--objective {name} compares {renderings} views of a sample, and these data have {data.views}; give --views "
            f"{max(renderings, 4)}."
        )
    if size % renderings or size < 2 * renderings > 2:
        raise ConfigError(
            f"--batch-size {size}: with --objective {name} {renderings} windows of a batch show one sample, so give a multiple "
            f"of {renderings} from {2 * renderings} on."
        )


def _shapes(module: Module, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return module(frames, np.array([frames.shape[1]]))
    except (RuntimeError, ValueError) as error:
        shape = " x ".join(str(size) for size in frames.shape[2:]) or "one number"
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"The network does not take frames of {shape}: {reason}. Change how the data are framed, or the network's "
            "first layer."
        ) from error


def _check_trainable(stage: int, layers: range, module: Module) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        where = f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start} to {layers.stop - 1}"
        raise ConfigError(
            f"Stage {stage}, {where} of the network, has nothing to train: it has no parameters, or all of them are frozen; "
            "make it one layer with the next one."
        )


def _check_lengths(stage: int, output_lengths: np.ndarray, data: DataSet) -> None:
    if output_lengths.min() < 1:
        name = data.ids[int(output_lengths.argmin())]
        raise DataError(
            f"{name} is too short: stage {stage} gives not a single frame of it; remove it, or change the network, or a "
            "data.frame_length that it does not fill."
        )


class _Compared:
    """Which cells of whole samples an objective compares, from the first stage to the last."""

    def __init__(self, config: Config) -> None:
        options = config.objective
        self._name, self._cells, self._skip = options.name, options.cells, options.skip
        self.wanted = config.data.frames == "whole" and self._cells > 1 and sees_cells(self._name)
        self._seen: np.ndarray | None = None
        """bool [rows of the output, rows of the sample]"""
        self._pairs = False
        """Whether a stage so far has cells that may be predicted from others."""

    def of_stage(
        self, network: Network, layers: range, frame_shape: tuple[int, ...], output_shape: tuple[int, ...]
    ) -> tuple[tuple[int, ...], int]:
        """The next stage's `cells` and `rows_between`. Raises ConfigError where it has no two cells without a row of the sample
        in common, and the objective does nothing but compare such."""
        if not self.wanted:
            return (), 0
        cells = tuple(min(self._cells, size) for size in output_shape[1:])
        if not predicts_rows(self._name):
            return cells, 0
        if min(len(frame_shape), len(output_shape)) > 1:
            with uncounted():
                seen = rows_seen(network, layers, frame_shape)
        else:  # a vector has no rows
            seen = np.ones((_rows(output_shape), _rows(frame_shape)), dtype=bool)
        self._seen = seen if self._seen is None else seen @ self._seen
        rows = cells[0] if cells else 1
        between = rows_between(self._seen, rows)
        self._pairs |= between is not None and self._skip < rows - 1
        if (between is None or self._skip >= rows - 1) and renderings_compared(self._name) == 1:
            why = (
                "see a part of it in common"
                if between is None
                else f"are {self._skip} rows apart, as objective.skip asks"
            )
            raise ConfigError(
                f"--objective {self._name}: of the {rows} rows of cells that layers {layers.start} to {layers.stop - 1} make "
                f"of a sample {'all' if between is None else 'none'} {why}; give --objective ntxent or infonce+ntxent, or more "
                "objective.cells where the output has more rows."
            )
        return cells, rows if between is None else between

    def check_pairs(self) -> None:
        """Raises ConfigError where the objective should predict cells and no stage has any to predict, though it does more."""
        if self.wanted and predicts_rows(self._name) and not self._pairs:
            raise ConfigError(
                f"--objective {self._name} predicts nothing: with objective.cells {self._cells}, objective.skip {self._skip} "
                "no stage has two cells that see no row of the sample in common; give --objective ntxent, or more cells and a "
                "larger data.picture."
            )


def _rows(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else 1


def _rows_of_gap(config: Config, stage: int, geometry: Geometry, rows: int) -> int:
    """objective.gap in rows of a stage's output. rows: of a window. Raises ConfigError where it leaves no target."""
    step = config.data.frame_step or config.data.frame_length
    between = int(config.objective.gap // (geometry.hop * step))
    if between and between + 2 > min(rows, config.objective.anchors):
        raise ConfigError(
            f"objective.gap {config.objective.gap} is {between} rows of stage {stage}, which leaves no target in a window of "
            f"{rows} with objective.anchors {config.objective.anchors}; give a lower gap, a larger data.window, or more "
            "anchors."
        )
    return between


def _check_rows(config: Config, rows: int, longest: int) -> None:
    """rows: of a window after the last stage; longest: frames of the longest sample."""
    predicts = config.data.frames != "whole" or predicts_rows(config.objective.name)
    needed = config.objective.skip + 2 if predicts else 1
    if rows < needed:
        if config.data.frames == "steps" and longest < config.data.window:
            raise ConfigError(
                f"The samples are too short: of the longest, {longest} frames, the last stage sees {rows}, and the objective "
                f"needs {needed}; give longer ones, or a lower objective.skip."
            )
        ways = {
            "steps": f"data.window {config.data.window} is too small; give at least {shortest_window(config.net, needed)}",
            "patches": "data.crop is too small for the steps of the objective; give a larger one, or a smaller "
            "data.patch_stride",
            "whole": f"--objective {config.objective.name} predicts frames from others, and --frames whole makes one of each "
            "sample; give --objective ntxent, --set objective.cells=4 to compare cells of its outputs, or other --frames",
        }
        raise ConfigError(
            f"{ways[config.data.frames]}: the last stage sees {rows} rows of a window, and the objective needs {needed}."
        )


def frame_labels(name: str, spec: StageSpec, data: DataSet, sample: int, frames: np.ndarray) -> np.ndarray:
    """str [F]: the label `name` at output frames (int64 [F]) of one sample."""
    return data.frame_labels(name, sample, frames * spec.geometry.hop + spec.geometry.offset)


def batch_effects(spec: StageSpec) -> BatchEffects:
    """What the module of a stage does with a batch in training. Found in host memory, which no meter counts."""
    first_backward_pass()
    with uncounted():
        return module_effects(spec.network, spec.layers, spec.frame_shape)


def check_shareable(specs: Sequence[StageSpec], ranks: Ranks) -> None:
    """Raises ConfigError that names the first module whose samples act on each other, where there are several ranks."""
    for spec in specs if ranks.count > 1 else ():
        why = batch_effects(spec).why_unsliceable
        if why:
            raise ConfigError(
                f"Stage {spec.stage}: {why}, so {ranks.count} processes cannot share its batches; train it in one, without "
                "torchrun."
            )

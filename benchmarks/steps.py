"""The training steps that the benchmarks compare: end to end, stages with the plain loss, our stages, and their floor."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from plain_infonce import plain_infonce
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerwise.config import Config, resolve
from layerwise.data.batches import Batch
from layerwise.data.source import DataSet
from layerwise.memory.device import on_device
from layerwise.memory.meter import AnyMeter, meter_for, uncounted
from layerwise.memory.plan import MemoryPlan
from layerwise.nets import build_network
from layerwise.nets.layer import vectors
from layerwise.nets.module import Module
from layerwise.nets.network import ranges
from layerwise.training.context import RunContext
from layerwise.training.spec import StageSpec, stage_specs
from layerwise.training.trainer import StageTrainer, StepRandomness

Step = Callable[[], object]


class Noise:
    """Random samples of one length: a DataSet without files."""

    identity, skipped, labels, frame_label_names, test = "noise", (), {}, (), None

    def __init__(self, frame_shape: tuple[int, ...], frames: int, columns: int, samples: int, views: int = 1) -> None:
        self.frame_shape, self.columns, self.views = frame_shape, columns, views
        self.ids = [str(number) for number in range(samples)]
        self.lengths = np.full(samples, frames)

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sample)
        return torch.randn(stop - start, *self.frame_shape, generator=generator)


def paper(kind: str, batch_size: int, **changes: object) -> tuple[Config, DataSet]:
    """The paper's network, "speech" or "vision", and noise of its window's size."""
    recipe = {"speech": "librispeech", "vision": "stl10"}[kind]
    config = resolve(recipe, overrides={"training.batch_size": batch_size, **changes})
    if kind == "speech":
        return config, Noise((1,), config.data.window, 1, samples=4 * batch_size)
    side = (config.data.crop - config.data.patch) // config.data.patch_stride + 1
    channels = 1 if config.data.gray else 3
    return config, Noise((channels, config.data.patch, config.data.patch), side * side, side, samples=4 * batch_size)


def natural_stages(config: Config, data: DataSet) -> list[StageSpec]:
    network = build_network(config.net, data.frame_shape)
    return stage_specs(config, data, network, network.natural_ranges)


def whole_network(config: Config, data: DataSet) -> StageSpec:
    network = build_network(config.net, data.frame_shape)
    return stage_specs(config, data, network, ranges([len(network.layers)]))[0]


def host_batch(config: Config, plan: StageSpec) -> Batch:
    """Noise as a stage reads it: float32 from the data set, float16 from a cache."""
    size, frames = config.training.batch_size, plan.window.frames
    with uncounted():
        noise = torch.randn(size, frames, *plan.frame_shape)
        return Batch(noise if plan.stage == 1 else noise.half(), np.full(size, frames))


class ConvolutionsAndGRU(nn.Module):
    """The speech network as PyTorch's own layers, for end-to-end training."""

    def __init__(self, config: Config, recompute: bool) -> None:
        super().__init__()
        net = config.net
        widths = [1, *[net.width] * len(net.kernels)]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(widths[i], net.width, net.kernels[i], net.strides[i], net.paddings[i])
            for i in range(len(net.kernels))
        )
        self.gru = nn.GRU(net.width, net.context, batch_first=True)
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.transpose(1, 2)
        for convolution in self.convolutions:
            layer = nn.Sequential(convolution, nn.ReLU())
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        x = x.transpose(1, 2)
        return x, self.gru(x)[0]


class Blocks(nn.Module):
    """The vision network for end-to-end training: its blocks are plain PyTorch."""

    def __init__(self, module: Module, recompute: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(module.layers.values())
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        outputs = vectors(x)
        return outputs, outputs


def plain_step(config: Config, plan: StageSpec, encoder: nn.Module, device: torch.device) -> Step:
    """A step of ordinary PyTorch: forward, plain InfoNCE, backward, fused Adam."""
    objective = plan.build_objective(config, device)
    adam = torch.optim.Adam([*encoder.parameters(), *objective.parameters()], lr=config.training.lr, fused=True)
    batch = host_batch(config, plan)

    def step() -> None:
        targets, contexts = encoder(on_device(batch.frames, device))
        draw = _draw(config, objective, plan, targets.shape[1])
        loss, _ = plain_infonce(targets, contexts, objective.predictors, draw)
        del targets, contexts
        loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def end_to_end(config: Config, data: DataSet, device: torch.device, recompute: bool) -> Step:
    plan = whole_network(config, data)
    if config.net.name == "speech":
        encoder: nn.Module = ConvolutionsAndGRU(config, recompute).to(device)
    else:
        encoder = Blocks(plan.build_module(0, device), recompute)
    return plain_step(config, plan, encoder, device)


def plain_stage(config: Config, plan: StageSpec, device: torch.device) -> Step:
    module = plan.build_module(0, device)

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            targets, outputs = module(x, np.full(len(x), x.shape[1]))
            return vectors(targets), vectors(outputs)

    return plain_step(config, plan, Outputs(), device)


def our_stage(config: Config, plan: StageSpec, device: torch.device, memory_plan: MemoryPlan, meter: AnyMeter) -> Step:
    """The step of a run; must be called inside the meter."""
    loaded = StageTrainer(plan, config, memory_plan, RunContext(device, meter))
    batch = host_batch(config, plan)
    if memory_plan.resident:
        batch = on_device_already(batch, memory_plan.resident, device)
    coming = [drawn_for_step(0)]
    batches = [loaded.prepared(batch, coming[0]) if memory_plan.ahead else batch]

    def step() -> object:
        coming.append(drawn_for_step(len(coming)))
        batches.append(loaded.prepared(batch, coming[-1]) if memory_plan.ahead else batch)
        loaded.send_for(batches[-1])
        return loaded.train(batches.pop(0), coming[-2])

    step.loaded, step.batch = loaded, batch
    return step


def on_device_already(batch: Batch, rows: int, device: torch.device) -> Batch:
    """A batch of so many rows that stay on the device: zeros."""
    numbers = torch.from_numpy(np.random.default_rng(0).integers(0, rows, (*batch.frames.shape[:2], 1)))
    stored = torch.zeros(rows, *batch.frames.shape[2:], dtype=batch.frames.dtype, device=device)
    return Batch(numbers, batch.lengths, rows=stored)


def drawn_for_step(number: int) -> StepRandomness:
    return StepRandomness(lambda: np.random.default_rng(number))


def floor_of(config: Config, plan: StageSpec, device: torch.device) -> list[Step]:
    """The module's forward and backward pass alone, and the predictors' matrix products alone."""
    module = plan.build_module(0, device)
    frames = on_device(host_batch(config, plan).frames, device)
    lengths = np.full(len(frames), frames.shape[1])
    objective = plan.build_objective(config, device)
    with torch.no_grad():
        ones = torch.ones_like(module(frames, lengths)[1])
    anchors = config.training.batch_size * min(config.objective.anchors * plan.window.columns, ones.shape[1])
    contexts = torch.randn(anchors, plan.output_shape[0], device=device)

    def forward_and_backward() -> None:
        module(frames, lengths)[1].backward(ones)
        module.zero_grad()

    def predictors() -> None:
        for predictor in objective.predictors.detach():
            predictions = contexts @ predictor.t()
            predictions.t() @ contexts
            predictions @ predictor

    return [forward_and_backward, predictors]


@dataclass(slots=True)
class Measured:
    """Peak in bytes and seconds of one step."""

    peak: int
    seconds: float = float("nan")


def peak_of(make: Callable[[AnyMeter], Step], device: torch.device, steps: int = 2) -> int:
    """Bytes at the highest point of some steps, parameters and optimizer included."""
    meter = meter_for(device, None)
    with meter:
        step = make(meter)
        for _ in range(steps):
            step()
    return meter.peak


def seconds_in_turn(steps: Sequence[Step], device: torch.device, rounds: int) -> list[float]:
    """Median seconds of each step; the steps take turns, so that what disturbs one disturbs all."""
    times: list[list[float]] = [[] for _ in steps]
    for round in range(rounds + 1):
        for step, of_step in zip(steps, times, strict=True):
            _wait(device)
            started = time.perf_counter()
            step()
            _wait(device)
            if round:
                of_step.append(time.perf_counter() - started)
    return [statistics.median(of_step) for of_step in times]


def metered_step(make: Callable[[AnyMeter], Step], device: torch.device) -> Step:
    """A step under a meter of its own, as in a run."""
    meter = meter_for(device, None)
    with meter:
        step = make(meter)

    def inside() -> None:
        with meter:
            step()

    return inside


def machine(device: torch.device) -> str:
    """One line for RESULTS.md."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}"


def _draw(config: Config, objective: nn.Module, plan: StageSpec, frames: int) -> object:
    lengths = np.full(config.training.batch_size, frames)
    return objective.draw(lengths, frames, plan.window.columns, np.random.default_rng(0))[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

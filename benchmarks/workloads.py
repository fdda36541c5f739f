"""What benchmarks/alternatives.py trains: a network as layers, a batch, and one InfoNCE loss at the top."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from host import Host
from steps import Noise, paper
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from layerwise.config import Config
from layerwise.memory.meter import uncounted
from layerwise.nets import build_network
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network, weight_seed, with_first_weights
from layerwise.nets.traced import same_attention
from layerwise.objectives.contrastive import Draw, InfoNCE
from layerwise.training.optimizer import adam


@dataclass(frozen=True)
class Workload:
    """A network and its batch, by the options of a run of layerwise."""

    config: Config
    data: Noise
    network: Network
    columns: int = 1
    """Frames of a row at the top."""
    slices: bool = True
    """Whether the samples of a batch do not act on each other, so that they can be worked off one by one."""
    loss_room: int = 2 * 2**20
    """Bytes of a block of the loss, where memory is saved; so small that the loss is not the peak."""
    together: tuple[int, ...] = ()
    """How many layers are streamed as one, where that saves transfers and takes no more memory; or nothing."""
    inputs_first: bool = False
    """Whether it saves memory in streaming to make gradients of inputs before those of weights, at no more work."""
    contexts_on_host: bool = False
    """Whether the contexts of the loss would be the peak of streaming if they were on the device."""
    stages: tuple["Stages", ...] = ()
    """Rows of layerwise."""

    @property
    def batch_size(self) -> int:
        return self.config.training.batch_size

    @property
    def at_once(self) -> int:
        """Samples of a slice, where the batch is sliced."""
        return 1 if self.slices else self.batch_size

    @property
    def frames(self) -> int:
        """Of a sample, at the bottom."""
        return int(self.data.lengths[0])

    def layers(self, host: Host) -> list[Layer]:
        """With their first weights, on the host."""
        seed = self.config.training.seed
        place = "meta" if host.rehearsed else "cpu"
        return [
            host.build(partial(with_first_weights, build, weight_seed(seed, index), place))
            for index, build in enumerate(self.network.layers)
        ]

    def batch(self, host: Host) -> torch.Tensor:
        """(B, L, *frame) on the host."""
        batch = host.empty(self.batch_size, self.frames, *self.data.frame_shape)
        generator = torch.Generator().manual_seed(0)
        return batch if host.rehearsed else host.build(lambda: batch.normal_(generator=generator))

    def objective(self, host: Host, channels: int, context_channels: int) -> InfoNCE:
        """The loss at the top, with its first weights, on the host."""
        options = self.config.objective
        build = partial(
            InfoNCE, channels, context_channels, options.steps, options.skip, options.negatives, options.anchors
        )
        return host.build(partial(with_first_weights, build, 1, "meta" if host.rehearsed else "cpu"))

    def draw(self, objective: InfoNCE, frames: int, number: int) -> Draw:
        """What step `number` scores, of so many frames at the top; its indices count the frames of the batch."""
        lengths = np.full(self.batch_size, frames)
        draw = objective.draw(lengths, frames, self.columns, np.random.default_rng(number))[0]
        everything = np.arange(self.batch_size * frames)
        return Draw(everything, draw.rows[draw.candidates], draw.rows[draw.contexts], draw.weights, draw.apart)

    def adam(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """For parameters on the device."""
        return adam(self.config.training.lr, self.config.training.adam_eps).make(parameters)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of a sample, behind each layer: (L, C)."""
        shapes = []
        with uncounted():
            x = torch.empty(1, self.frames, *self.data.frame_shape, device="meta")
            for build in self.network.layers:
                x = with_first_weights(build, 0, "meta")(x)
                shapes.append(tuple(x.shape[1:]))
        return shapes


class Stages(NamedTuple):
    """How layerwise cuts and lays out a network."""

    layers: int
    """Of a stage."""
    budget: str | None = None
    """A value of --gpu-mem, or smallest; None for no limit."""
    projection: int | None = None
    """objective.projection, as recipe fsdd has it; None for predictors of whole channels, as in the paper."""


SPEECH = (Stages(1), Stages(1, "40MB"), Stages(1, "smallest"), Stages(1, None, 128), Stages(1, "smallest", 128))
LAYERS = (
    *(Stages(layers) for layers in (1, 4, 12)),
    *(Stages(1, budget) for budget in ("10.5MB", "smallest")),
    *(Stages(1, budget, 128) for budget in (None, "10.5MB", "smallest")),
)
BLOCKS = (
    *(Stages(layers) for layers in (1, 2, 4)),
    Stages(1, "137MB"),
    *(Stages(layers, "smallest") for layers in (1, 2, 4)),
)


def speech(batch_size: int, width: int = 512) -> Workload:
    """The paper's network. The outputs of its first layer are four times as large as those of the second, which reads them:
    both together take no more room than the second alone."""
    config, data = paper("speech", batch_size, **{"net.width": width, "net.context": width // 2})
    network, large = build_network(config.net, (1,)), batch_size > 8
    return Workload(
        config, data, network, together=(2, 1, 1, 1, 1), inputs_first=True, contexts_on_host=large, stages=SPEECH
    )


def equal_layers(count: int, width: int = 512) -> Workload:
    """Convolutions over 128 frames."""
    shape = {"net.kernels": (3,) * count, "net.strides": (1,) * count, "net.paddings": (1,) * count}
    config, _ = paper("speech", 8, **shape, **{"net.width": width, "net.context": 0, "data.window": 128})
    data = Noise((width,), 128, 1, samples=32)
    return Workload(config, data, build_network(config.net, (width,)), stages=LAYERS)


def transformer(blocks: int, width: int, heads: int, batch_size: int) -> Workload:
    """A stack of the shape of ViT-L, over 196 frames."""
    config, _ = paper("speech", batch_size, **{"net.name": "own", "data.window": 196})
    data = Noise((width,), 196, 1, samples=4 * batch_size)
    network = Network([partial(TransformerBlock, width, heads)] * blocks, natural_cut=(1,) * blocks)
    return Workload(config, data, network, loss_room=4 * 2**20, stages=BLOCKS)


class TransformerBlock(Layer):
    """Attention and a wide MLP, each behind its layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with same_attention():
            return self.block(x)


def pictures(side: int, blocks: tuple[int, int, int, int], batch_size: int = 8) -> Workload:
    """The body of a ResNet; its frames are the positions of the last feature map. Batch norm ties the samples."""
    # Its smallest gradients are those of a larger epsilon: at 1e-6 Adam makes steps of their rounding.
    config, _ = paper("vision", batch_size, **{"net.name": "own", "training.adam_eps": 1e-5})
    data = Noise((3,), side * side, side, samples=4 * batch_size)
    network = Network([partial(PictureLayer, blocks, index) for index in range(1 + sum(blocks))], natural_cut=())
    return Workload(config, data, network, columns=side // 32, slices=False, loss_room=32 * 2**20)


class PictureLayer(Layer):
    """A part of a ResNet, over pictures as rows of pixels: (B, H * W, C), which is torch's channels-last order."""

    def __init__(self, blocks: tuple[int, int, int, int], index: int) -> None:
        super().__init__()
        with torch.device("meta"):
            body = ResNet(Bottleneck, list(blocks))
        stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
        parts = [stem, *body.layer1, *body.layer2, *body.layer3, *body.layer4]
        self.part = parts[index].to_empty(device=torch.empty(0).device)
        for module in self.part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = isqrt(x.shape[1])
        pictures = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return self.part(pictures).permute(0, 2, 3, 1).flatten(1, 2)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "speech-8": partial(speech, 8),
    "speech-64": partial(speech, 64),
    "layers-24": partial(equal_layers, 24),
    "layers-48": partial(equal_layers, 48),
    "vit-l": partial(transformer, 24, 1024, 16, 32),
    "resnet-1024": partial(pictures, 1024, (3, 4, 6, 3)),
}

SMALLER: dict[str, Callable[[], Workload]] = {
    "speech-64": partial(speech, 64, width=64),
    "vit-l": partial(transformer, 6, 256, 4, 8),
    "resnet-1024": partial(pictures, 128, (2, 2, 2, 2)),
}
"""Copies of the same shape, on which weights are checked and time is taken where a step takes minutes on a CPU."""

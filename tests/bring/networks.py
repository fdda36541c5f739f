"""Networks that people bring, small: of timm, transformers and torchvision, and of their own.

Imported by the tests, and by benchmarks/brought.py, which tries all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Brought:
    """A network, and the frames that it reads."""

    build: Callable[[], nn.Module]
    frame_shape: tuple[int, ...]
    at: str
    """The module that begins the second of two stages."""
    ids: int = 0
    """How many different whole numbers it reads; 0 where it reads any numbers."""


PICTURE, WAVE, WORDS = (3, 32, 32), (1, 400), (1, 12)


def of_timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=0, **settings)

    return build


TIMM = {
    "timm vit": Brought(
        of_timm(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, drop_path_rate=0.2
        ),
        PICTURE,
        at="blocks.1",
    ),
    "timm resnet": Brought(of_timm("resnet10t", channels=(8, 8, 16, 16)), PICTURE, at="layer3"),
    "timm convnext": Brought(
        of_timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), drop_path_rate=0.1), PICTURE, at="stages.2"
    ),
    "timm swin": Brought(
        of_timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(1, 2),
        ),
        PICTURE,
        at="layers.1",
    ),
    "timm efficientnet": Brought(of_timm("test_efficientnet"), PICTURE, at="blocks.3"),
}


def of_transformers(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
        if kind in ("Wav2Vec2", "Hubert", "Bert", "GPT2"):
            model.register_forward_pre_hook(without_channel)
        return model

    return build


def without_channel(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Frames (N, 1, length) to (N, length)."""
    return inputs[0].squeeze(1), *inputs[1:]


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
SOUND = SMALL | CONVOLUTIONS | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}

TRANSFORMERS = {
    "transformers vit": Brought(of_transformers("ViT", **SMALL, image_size=32, patch_size=8), PICTURE, at="layers.1"),
    "transformers wav2vec2": Brought(
        of_transformers("Wav2Vec2", **SOUND, apply_spec_augment=False), WAVE, at="encoder.layers.1"
    ),
    "transformers hubert": Brought(
        of_transformers("Hubert", **SOUND, apply_spec_augment=False), WAVE, at="encoder.layers.1"
    ),
    "transformers bert": Brought(of_transformers("Bert", **SMALL, vocab_size=50), WORDS, at="encoder.layer.1", ids=50),
    "transformers gpt2": Brought(
        of_transformers("GPT2", n_embd=32, n_layer=3, n_head=2, n_positions=16, vocab_size=50), WORDS, at="h.1", ids=50
    ),
}


def tv_resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=8, width_per_group=2)


def tv_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=8)


def tv_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2], num_classes=8, stochastic_depth_prob=0.2)


def tv_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], stochastic_depth_prob=0.2, num_classes=8)


TORCHVISION = {
    "torchvision resnet": Brought(tv_resnet, PICTURE, at="layer3"),
    "torchvision vit": Brought(tv_vit, PICTURE, at="encoder.layers.encoder_layer_1"),
    "torchvision swin": Brought(tv_swin, PICTURE, at="features.2"),
    "torchvision convnext": Brought(tv_convnext, PICTURE, at="features.3"),
}


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(6, 8, 5, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(168, 8)
    )


def three_dimensional() -> nn.Module:
    def block(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(channels, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU(inplace=True))

    return nn.Sequential(block(1), block(8), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 8))


class Tokens(nn.Module):
    """Words to states, with a mask that is made once and used by all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 16), nn.Embedding(12, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.squeeze(1)
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return x


class Tied(nn.Module):
    """Uses one block twice, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.out = (
            nn.Linear(10, 16),
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)),
            nn.Linear(16, 8),
        )
        self.before, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.before.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = self.block(self.block(x))
        return self.last(self.before(self.out(x).relu()).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru, self.lstm = (
            nn.Conv1d(2, 8, 5, 2),
            nn.GRU(8, 6, batch_first=True),
            nn.LSTM(6, 6, batch_first=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.conv(x).transpose(1, 2))
        _, (last, _) = self.lstm(states)
        return last[-1]


class Counted(nn.Module):
    """Has hooks at its root and inside, a part that works without gradients, and numbers drawn in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()
        self.body = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 16), Whitening(16), nn.Linear(16, 8))
        self.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        self.register_forward_hook(lambda module, inputs, output: output + 1)
        self.body[0].register_forward_hook(lambda module, inputs, output: output.sin())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.noise(x) * torch.empty(x.shape).uniform_(0.5, 1))


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Whitening(nn.Module):
    """Divides by a running deviation, which it keeps without gradients."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.deviation.mul_(0.9).add_(0.1 * x.std(0))
        return x / self.deviation


OWN = {
    "own 1-D": Brought(one_dimensional, (6, 50), at="3"),
    "own 3-D": Brought(three_dimensional, (1, 8, 8, 8), at="1"),
    "own tokens": Brought(Tokens, WORDS, at="layers.1", ids=30),
    "own tied": Brought(Tied, (10,), at="out"),
    "own recurrent": Brought(Recurrent, (2, 20), at="gru"),
    "own with hooks": Brought(Counted, (10,), at="body.2"),
}

NETWORKS = TIMM | TRANSFORMERS | TORCHVISION | OWN


def built(name: str) -> nn.Module:
    """The network of this name, with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name].build()

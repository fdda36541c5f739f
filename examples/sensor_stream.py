"""A stream of a sensor of your own, six channels at 50 Hz, with a network of a Conv1d and a Transformer.

python examples/sensor_stream.py [--seconds 60] [--epochs 10] [--out runs/sensor]

A frame is a second of the stream, one every half second; each stage learns to predict the frames ahead (InfoNCE).
"""

import argparse

import numpy as np
import torch
from torch import nn

import layerwise

ACTIVITIES = ("rest", "walk", "run", "cycle")
RATE = 50


class Streams(torch.utils.data.Dataset):
    """Each item: (steps [L, 6], name of the activity). Yours would read a file."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        rng = np.random.default_rng(index)  # the same at every call
        activity = index % len(ACTIVITIES)
        time = np.arange(self.seconds * RATE)[:, None] / RATE
        pace = (0.1, 1.8, 2.8, 1.2)[activity] * rng.uniform(0.9, 1.1)
        phases, gains = rng.uniform(0, 2 * np.pi, (2, 6)), (0.1, 1.0, 2.0, 0.6)[activity] * rng.uniform(0.5, 1, (2, 6))
        waves = sum(gains[n] * np.sin(2 * np.pi * (n + 1) * pace * time + phases[n]) for n in range(2))
        return (waves + 0.3 * rng.standard_normal(waves.shape)).astype(np.float32), ACTIVITIES[activity]


class SensorNet(nn.Module):
    """Frames (N, 6 channels, 50 steps) to tokens: (N, 10, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 64, kernel_size=5, stride=5)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.conv(x).transpose(1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", default="runs/sensor")
    asked = parser.parse_args()

    torch.manual_seed(0)
    streams, network = Streams(asked.seconds), SensorNet()
    framing = {"data.frame_length": RATE, "data.frame_step": RATE // 2, "data.window": 32, "objective.steps": 4}
    result = layerwise.run(
        network, streams, frames="steps", gpu_mem="40MB", max_epochs=asked.epochs, out=asked.out, options=framing
    )
    print(f"device peak {max(stage.peak_bytes for stage in result.state.stages) / 1e6:.1f} MB")
    for stage in layerwise.probe(asked.out, "label", network=network, data=streams).stages:
        print(f"stage {stage.stage}: error {stage.error:.1%}, with random weights {stage.untrained_error:.1%}")
    encoder = layerwise.load(asked.out, network=network)
    stream = torch.from_numpy(streams[0][0])[None]  # (B, steps, 6)
    print("features", tuple(encoder(stream).shape))


if __name__ == "__main__":
    main()

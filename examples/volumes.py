"""A three-dimensional network on volumes, such as scans, under a budget that the whole network would not fit.

python examples/volumes.py [--side 32] [--volumes 96] [--epochs 10] [--out runs/volumes]

Volumes are whole samples; each stage tells two renderings of a volume from those of others (NT-Xent).
"""

import argparse

import numpy as np
import torch
from torch import nn

import layerwise


def volumes(count: int, side: int) -> list[tuple[np.ndarray, str]]:
    """Balls and boxes in noise: (volume [1, D, H, W], shape). Yours would be a Dataset that reads a file for each item."""
    rng, grid = np.random.default_rng(0), np.indices((side,) * 3)
    made = []
    for number in range(count):
        centre, radius = rng.uniform(0.35, 0.65, 3) * side, rng.uniform(0.15, 0.3) * side
        offsets = np.abs(grid - centre[:, None, None, None])
        inside = np.sqrt((offsets**2).sum(0)) < radius if number % 2 else offsets.max(0) < 0.8 * radius
        volume = inside + 0.5 * rng.standard_normal((side,) * 3)
        made.append((volume[None].astype(np.float32), "ball" if number % 2 else "box"))
    return made


def block(channels_in: int, channels: int) -> nn.Sequential:
    """Halves every side."""
    conv = nn.Conv3d(channels_in, channels, kernel_size=3, stride=2, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(4, channels), nn.ReLU())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--volumes", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", default="runs/volumes")
    asked = parser.parse_args()

    torch.manual_seed(0)
    data = volumes(asked.volumes, asked.side)
    network = nn.Sequential(block(1, 16), block(16, 32), block(32, 64), block(64, 64))
    stages = layerwise.cut(network, torch.zeros(16, 1, *(asked.side,) * 3), stages=3)
    result = layerwise.run(stages, data, gpu_mem="200MB", batch_size=16, max_epochs=asked.epochs, out=asked.out)
    print([f"{stage.peak_bytes / 1e6:.1f} MB" for stage in result.state.stages])
    for stage in layerwise.probe(asked.out, "label", network=stages, data=data).stages:
        print(f"stage {stage.stage}: error {stage.error:.1%}, with random weights {stage.untrained_error:.1%}")
    encoder = layerwise.load(asked.out, network=stages)
    print("features", tuple(encoder(torch.from_numpy(data[0][0])[None]).shape))


if __name__ == "__main__":
    main()

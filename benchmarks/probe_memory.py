"""Host memory of a run on large whole pictures, and of a probe of it; each in a process of its own.

python benchmarks/probe_memory.py [--pictures 2000] [--side 224]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

CLASSES = ("cat", "ship")


def network(frame_shape: tuple[int, ...]) -> nn.Module:
    """A small network, so that the pictures outweigh it."""
    return nn.Sequential(
        *(nn.Conv2d(frame_shape[0], 8, 7, stride=4), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_pictures(folder / "pictures", options.pictures, options.side)
        data = ("--data", f"images:{folder / 'pictures'}", "--frames", "whole", "--set", f"data.picture={options.side}")
        short = ("--max-epochs", "1", "--device", "cpu", "--set", "data.gray=false")
        places = ("--out", str(folder / "run"), "--cache-dir", str(folder / "cache"))
        peaks = {
            "layerwise run": peak_of("run", "--net", "probe_memory:network", *data, *short, *places),
            "layerwise probe": peak_of("probe", str(folder / "run"), "--label", "class"),
        }
    print(
        f"{options.pictures} pictures of {options.side} x {options.side}\n\n| command | host peak MB |\n| --- | --- |"
    )
    for command, peak in peaks.items():
        print(f"| {command} | {peak / 1e6:.0f} |")


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Noise, as JPEG in two class folders."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / CLASSES[number % 2] / f"{number:05}.jpg")


def peak_of(*arguments: str) -> int:
    """Most bytes of host memory that `layerwise` held with these arguments."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-m", "layerwise", *arguments], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"layerwise {arguments[0]} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()

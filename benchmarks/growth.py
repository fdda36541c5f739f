"""Peak and host memory against the number of stages and the size of the data; each run in a process of its own.

python benchmarks/growth.py [--device cpu]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

WIDTH = 64
RECORDINGS = 40
STAGES = (6, 24, 96)
SIZES = (1, 10, 100)


def configuration(folder: Path, stages: int, device: str) -> dict[str, object]:
    """A network of like stages: every one a convolution of the same width, the first with a stride."""
    return {
        "data.source": f"speech:{folder / 'recordings'}",
        "data.sample_rate": 8000,
        "data.window": 2560,
        "net.width": WIDTH,
        "net.context": 0,
        "net.kernels": [10] + [3] * (stages - 1),
        "net.strides": [5] + [1] * (stages - 1),
        "net.paddings": [2] + [1] * (stages - 1),
        "training.stages": stages,
        "training.max_epochs": 1,
        "training.batch_size": 8,
        "training.device": device,
        "out": str(folder / "run"),
        "cache.dir": str(folder / "cache"),
        "cache.block": "1MB",  # so that even the smallest data set fills the buffers
    }


def cases() -> Iterator[tuple[int, int]]:
    for stages in STAGES:
        yield stages, 1
    for times in SIZES[1:]:
        yield STAGES[0], times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", nargs=2, type=int, help="STAGES TIMES: one case in this process, for the others")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(*options.case, options.device)))
        return
    print("| stages | data | device peak MB | of the first | host peak MB | of the first | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first = None
    for stages, times in cases():
        command = [sys.executable, __file__, "--device", options.device, "--case", str(stages), str(times)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        first = first or found
        device, host = found["device"] / first["device"], found["host"] / first["host"]
        sizes = f"{found['device'] / 1e6:.3f} | {device:.3f} | {found['host'] / 1e6:.0f} | {host:.3f}"
        print(f"| {stages} | {times}x | {sizes} | {found['seconds']:.0f} |", flush=True)


def run_case(stages: int, times: int, device: str) -> dict[str, float]:
    """Peaks in bytes of one run of one epoch a stage."""
    from layerwise.config import resolve
    from layerwise.engines.run import run

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "recordings").mkdir()
        for number in range(RECORDINGS * times):
            noise = 0.1 * np.random.default_rng(number).standard_normal(2560)
            soundfile.write(folder / "recordings" / f"{number:05}.wav", noise, 8000)
        state = run(resolve("librispeech", overrides=configuration(folder, stages, device))).state
        return {
            "device": max(record.peak_bytes or 0 for record in state.stages),
            "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "seconds": sum(record.seconds for record in state.stages),
        }


if __name__ == "__main__":
    main()

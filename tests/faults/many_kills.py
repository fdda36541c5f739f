"""Kills a small run at random moments, hundreds of times, and compares the end of each with that of an undisturbed one.

    python tests/faults/many_kills.py [--runs 200] [--seed 0] [--keep needed|all|last] [--cache auto|never]
        [--compression none|zstd] [--gpu-mem SIZE|smallest]

Every run is killed once with SIGKILL, started again, and must end with the same encoder and the same caches, byte for
byte. A run that ended before its kill does not count. The processes are forked from one that has imported everything, so
a run takes a few seconds. --gpu-mem smallest: the smallest budget of all, at which every step is streamed.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.numpy import load_file

from layerwise.config import Config, resolve
from layerwise.engines.plan import plan
from layerwise.engines.run import run

OPTIONS = {
    "net.width": 16,
    "net.context": 16,
    "net.kernels": [10, 8],
    "net.strides": [5, 4],
    "net.paddings": [2, 2],
    "objective.steps": 3,
    "objective.anchors": 32,
    "data.sample_rate": 8000,
    "data.window": 1600,
    "training.max_epochs": 3,
    "training.batch_size": 4,
    "training.checkpoint_seconds": 0.02,
    "cache.block": "16KiB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="needed")
    parser.add_argument("--cache", default="auto")
    parser.add_argument("--compression", default="none")
    parser.add_argument("--gpu-mem")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        extra = {
            "cache.keep": options.keep,
            "cache.policy": options.cache,
            "cache.compression": options.compression,
        }
        if options.gpu_mem == "smallest":
            extra["memory.gpu_mem"] = f"{smallest_budget(Path(name), extra)}B"
        elif options.gpu_mem:
            extra["memory.gpu_mem"] = options.gpu_mem
        kill_runs(Path(name), options.runs, options.seed, extra)


def smallest_budget(folder: Path, extra: dict[str, str]) -> int:
    """Bytes."""
    return plan(config_in(folder, write_recordings(folder / "recordings"), extra)).smallest_budget_bytes


def kill_runs(folder: Path, runs: int, seed: int, extra: dict[str, str]) -> None:
    """Prints how many were killed, resumed and equal. Raises AssertionError at the first that is not equal."""
    data = write_recordings(folder / "recordings")
    plan(config_in(folder / "undisturbed", data, extra))  # what its stages take is known to all forks then
    started = time.monotonic()
    assert wait(begin(config_in(folder / "undisturbed", data, extra))) == 0
    seconds = time.monotonic() - started
    expected = bits(folder / "undisturbed")
    moments, killed, ended = random.Random(seed), 0, 0
    while killed < runs:
        place = folder / f"killed-{killed + ended}"
        config = config_in(place, data, extra)
        child = begin(config)
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if wait(child) == 0:
            ended += 1
        else:
            killed += 1
            assert wait(begin(config)) == 0, f"{place} did not go on"
        assert bits(place) == expected, f"{place} ended with other bits"
        shutil.rmtree(place)
        print(outcome(killed, ended), flush=True)  # a long campaign may be ended by its time


def outcome(killed: int, ended: int) -> str:
    """Of those so far: any other would have ended the campaign."""
    return f"{killed} runs killed, {killed} resumed, {killed} with the bits of the undisturbed; {ended} ended before their kill"


def config_in(place: Path, data: Path, extra: dict[str, str]) -> Config:
    places = {"data.source": f"speech:{data}", "out": str(place / "run"), "cache.dir": str(place / "cache")}
    return resolve(overrides={**OPTIONS, **places, **extra})


def begin(config: Config) -> int:
    """The process id of a run that has begun."""
    child = os.fork()
    if child == 0:
        try:
            run(config)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return child


def wait(child: int) -> int:
    """0 where it ended by itself and well."""
    return os.waitpid(child, 0)[1]


def bits(place: Path) -> dict[str, bytes]:
    """Of the encoder's weights and of every cache file."""
    weights = load_file(place / "run" / "encoder.safetensors")
    caches = (place / "cache" / "run").glob("stage-*")
    return {name: value.tobytes() for name, value in weights.items()} | {
        path.name: path.read_bytes() for path in caches
    }


def write_recordings(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(24):
        path = folder / f"speaker-{number % 3}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(rng.integers(2000, 5000)), 8000)
    return folder


if __name__ == "__main__":
    main()

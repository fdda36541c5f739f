"""Prints a SHA-256 of the encoder and of each cache of six small runs, to compare two versions of the code.

`python benchmarks/bits.py FSDD CIFAR10 > before.txt`, the same with the other version, and `diff`. Both are run in a folder
of the same name, for the places of a run are in the metadata of its encoder. FSDD and CIFAR10: folders of the real data.
"""

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

NETWORK = """
from torch import nn
def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Conv2d(16, 16, 3, 2, 1), nn.Dropout(0.1), nn.Flatten(), nn.Linear(256, 32))
"""
SPEECH = shlex.split(
    "--recipe fsdd --data fsdd:digits --max-epochs 2 --stages 4 --seed 3 --keep all --set net.width=16 "
    "--set net.context=16 --set data.window=5120 --set objective.steps=4 --set objective.anchors=32"
)
OF_PICTURES = shlex.split("--data images:pictures/train --keep all --set data.gray=false --set data.picture=32")
PICTURES = shlex.split("--recipe cifar10-patches --max-epochs 1 --set net.width=4 --set net.blocks=[1,1,1]")
OWN = shlex.split("--recipe whole --net bits_network:network --objective ntxent --views 4 --max-epochs 2")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
LAYERWISE = [sys.executable, "-m", "layerwise", "run", "--device", "cpu"]


def link(source: Path, folder: Path, pattern: str, every: int) -> None:
    """A folder with every n-th file of a data set, in folders of the same names."""
    for path in sorted(source.glob(pattern))[::every]:
        place = folder / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)


def main(fsdd: Path, cifar10: Path) -> None:
    with TemporaryDirectory() as temporary:
        os.chdir(temporary)
        Path("bits_network.py").write_text(NETWORK)
        link(fsdd.resolve(), Path("digits"), "recordings/*.wav", 25)
        link(cifar10.resolve(), Path("pictures"), "train/*/*", 100)
        runs = {
            "speech": [*LAYERWISE, *SPEECH, "--gpu-mem", "3MB"],
            "pictures": [*LAYERWISE, *PICTURES, *OF_PICTURES],
            "own": [*LAYERWISE, *OWN, *OF_PICTURES],
            "rounds": [*LAYERWISE, *SPEECH, "--rounds", "2"],
            "ranks": [*TORCHRUN, *LAYERWISE, *SPEECH],
            "recompute": [*LAYERWISE, *SPEECH, "--cache", "never"],
        }
        search = os.pathsep.join([os.environ.get("PYTHONPATH", ""), "."])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search}
        for name, command in runs.items():
            done = subprocess.run(
                [*command, "--out", f"runs/{name}"],
                capture_output=True,
                text=True,
                env=environment,
            )
            if done.returncode:
                sys.exit(f"{name}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
            for path in sorted([*Path("runs", name).rglob("encoder.safetensors"), *Path("cache", name).rglob("*.h5")]):
                print(name, path, hashlib.sha256(path.read_bytes()).hexdigest(), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

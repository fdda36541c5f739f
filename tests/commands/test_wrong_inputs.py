"""What a person types wrongly: one sentence, exit code 2, and nothing on the disk is changed.

To add one, add a line to WRONG: the command line as it is typed in the folder that `world` builds, and words of the answer.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tomli_w
from PIL import Image

from layerwise.commands import main

WRONG = [
    # options and commands
    ("layerwise run --resume", "No such option '--resume'"),
    ("layerwise run --gpu-mm 4GB", "Did you mean '--gpu-mem'?"),
    ("layerwise run --data", "'--data' requires an argument"),
    ("layerwise trian", "No such command 'trian'"),
    ("layerwise statsu run", "Did you mean one of: 'status'"),
    ("layerwise cache lst", "Did you mean 'ls'?"),
    ("layerwise status", "Missing argument 'DIR'"),
    ("layerwise status run other", "unexpected extra argument"),
    ("layerwise probe run", "Missing option '--label'"),
    ("layerwise completion", "Choose from: bash, zsh, fish"),
    ("layerwise completion tcsh", "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    ("layerwise recipes libri", "Did you mean librispeech?"),
    ("layerwise run --recipe dmeo", "Did you mean demo?"),
    ("layerwise run --set objective.negativs=3", "did you mean objective.negatives?"),
    ("layerwise run --set lr", "write it as key=value"),
    ("layerwise run --config tiny.toml --data speech:recordings --objective infonec", "Did you mean infonce?"),
    # values
    ("layerwise run --gpu-mem 4", "4 has no unit; write it like 4GB"),
    ("layerwise run --gpu-mem=-4GB", "--gpu-mem: "),
    ("layerwise run --disk lots", "'lots' is not a size"),
    ("layerwise run --time 30", "30 has no unit; write it like 2h"),
    ("layerwise run --time soon", "'soon' is no length of time"),
    ("layerwise run --devices gpu0", "'gpu0' is no device; write --devices 0,1,2"),
    ("layerwise run --device tpu", "--device: must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ("layerwise run --lr fast", "--lr: must be a number, got 'fast'"),
    ("layerwise run --max-epochs 0", "--max-epochs: "),
    ("layerwise run --batch-size 8.5", "--batch-size: must be a whole number"),
    ("layerwise run --keep needet", "Did you mean needed?"),
    ("layerwise run --precision half", "--precision: input should be 'float32', 'bfloat16' or 'float16'"),
    ("layerwise run --max-epochs 2 --rounds 3", "give at least one epoch to each round"),
    ("layerwise run --set net.strides=[3]", "one entry per convolution"),
    ("layerwise run --from-stage two", "'two' is not a valid integer"),
    ("layerwise run --from-stage 2 --config tiny.toml --data speech:recordings", "would begin anew"),
    ("layerwise run --dry-run", "give --engine slurm, too"),
    ("layerwise run --config tiny.toml --data speech:recordings --stages 99", "--stages 99"),
    ("layerwise run --config small.toml --data speech:recordings --gpu-mem 10kB --batch-size 1", "is too small: stage"),
    ("layerwise plan --config tiny.toml --data speech:recordings --net vision", "--net vision trains on pictures"),
    ("layerwise plan --config tiny.toml --data speech:recordings --set data.window=60", "data.window 60 is too small"),
    ("layerwise compare --config tiny.toml --data speech:recordings", "compare needs --label NAME"),
    ("layerwise compare --label speaker --methods cpx", "Did you mean cpc?"),
    ("layerwise compare --label speaker --seeds 0", "Invalid value for '--seeds'"),
    # files of options
    ("layerwise run --config nowhere.toml", "nowhere.toml cannot be read: No such file"),
    ("layerwise run --config broken.toml", "broken.toml is not valid TOML"),
    ("layerwise run --config corrupt/broken.wav", "is not valid TOML"),
    ("layerwise run --config recordings", "recordings cannot be read: Is a directory"),
    ("layerwise init --data speech:recordings -o tiny.toml", "tiny.toml exists"),
    ("layerwise init --config tiny.toml --data speech:recordings -o nowhere/config.toml", "cannot be written"),
    # data
    ("layerwise run --data vidoe:x", "there is no module vidoe"),
    ("layerwise run --data image:pictures", "Did you mean images?"),
    ("layerwise run --data imagse:pictures", "Did you mean images?"),
    ("layerwise run --data recordings", "write demo, or one of speech:PATH"),
    ("layerwise run --data npyy:numbers/x.npy", "Did you mean npy?"),
    ("layerwise run --data speech", "name the place too, like speech:DIR"),
    ("layerwise run --data npy", "name the place too, like npy:FILE"),
    ("layerwise run --data npy:nowhere.npy", "There is no file nowhere.npy"),
    ("layerwise run --data npy:corrupt/broken.wav", "cannot be read as a .npy file of numbers"),
    ("layerwise run --data h5:corrupt/broken.wav", "cannot be read as an HDF5 file"),
    ("layerwise run --data npy:words.npy", "arrays of numbers can be trained on"),
    ("layerwise run --data npy:flat.npy", "give samples first"),
    (
        "layerwise run --recipe cifar10",
        "without --data there are only the recordings of the demo; name some with --data",
    ),
    ("layerwise plan --frames whole", "reads whole samples"),
    ("layerwise run --data npy:numbers.npy --frames patches", "for patches give pictures"),
    ("layerwise run --data npy:numbers.npy --frames stpes", "Did you mean steps?"),
    ("layerwise run --data npy:numbers.npy --frames whole", "--net speech trains on recordings"),
    ("layerwise run --data npy:numbers.npy --net vision", "give pictures as files"),
    ("layerwise run --data mine:nothing", "mine has no function nothing"),
    ("layerwise run --data mine:text", "The data are a str"),
    ("layerwise run --data mine:augmented --net mine:network --frames steps", "another sample at each call"),
    ("layerwise run --data mine:broken", "the function failed (ZeroDivisionError"),
    # networks
    (
        "layerwise run --net resnet50",
        "--net: must be speech, vision, convnet, torchvision:NAME, timm:NAME, hf:PATH or package.module:function",
    ),
    ("layerwise run --data images:pictures --net torchvison:resnet50", "Did you mean torchvision?"),
    ("layerwise run --data images:pictures --net torchvision:resnet5", "torchvision has no such model"),
    (
        "layerwise run --data images:pictures --net torchvision:resnet18 --set data.gray=true",
        "reads square colour pictures",
    ),
    ("layerwise run --data npy:numbers.npy --net mine:network --batch-size 7", "give a multiple of 2"),
    ("layerwise run --data npy:numbers.npy --net mine:network --views 1", "compares 2 views of a sample"),
    ("layerwise run --data npy:numbers.npy --net mine:network --objective infonce", "makes one of each sample"),
    ("layerwise run --data npy:numbers.npy --net mine:data", "gives a list; let it return an nn.Module"),
    ("layerwise run --data npy:numbers.npy --net mine:narrow --frames whole", "The network fails at 'linear'"),
    ("layerwise run --data npy:numbers.npy --net mine:network --frames whole --stages 9", "at most 2 stages"),
    ("layerwise init --data speech:nowhere", "nowhere does not exist"),
    ("layerwise run --data speech:nowhere", "nowhere does not exist"),
    ("layerwise run --data speech:empty", "empty holds no recordings"),
    ("layerwise run --data speech:texts", "texts holds no recordings"),
    ("layerwise run --data speech:recordings/0.wav", "is not a folder"),
    ("layerwise run --data speech:corrupt", "the first: broken.wav, cannot be decoded"),
    ("layerwise run --data speech:dangling", "the first: gone.wav, a link to what is not there"),
    ("layerwise run --data speech:pictures", "pictures holds no recordings"),
    ("layerwise run --data images:recordings", "recordings holds no pictures"),
    (
        "layerwise run --data images:torn",
        "0 usable pictures and 1 unusable ones; the first: cats/torn.png, not a picture",
    ),
    ("layerwise run --data fsdd:corrupt", "corrupt"),
    ("layerwise run --data cifar10:pictures", "CIFAR10 is not complete"),
    ("layerwise run --config tiny.toml --data speech:recordings --objective supervised --label mood", "no such label"),
    ("layerwise run --config tiny.toml --data speech:recordings --set data.pattern=(", "data.pattern"),
    # places
    ("layerwise run --config tiny.toml --data speech:recordings --out file", "--out file is a file; name a folder"),
    ("layerwise run --config tiny.toml --data speech:recordings --out texts", "holds something else (poem.txt)"),
    ("layerwise run --config tiny.toml --data speech:recordings --out file/below", "cannot be written"),
    ("layerwise run --config tiny.toml --data speech:recordings --cache-dir file", "cannot be written"),
    # runs
    ("layerwise status nowhere", "There is no run directory nowhere"),
    ("layerwise status empty", "empty is not a run directory"),
    ("layerwise status file", "There is no run directory file"),
    ("layerwise status torn-run", "run.json is damaged"),
    ("layerwise report nowhere", "nowhere"),
    ("layerwise report texts", "texts"),
    ("layerwise probe nowhere --label speaker", "There is no run directory nowhere"),
    ("layerwise probe run --label digits", "Did you mean digit?"),
    ("layerwise probe run --label digit --classifier nearest", "there are linear, knn"),
    ("layerwise extract run nowhere.wav -o features.h5", "There is no file or folder nowhere.wav"),
    ("layerwise extract run corrupt/broken.wav -o features.h5", "Nothing of corrupt/broken.wav can be used"),
    ("layerwise extract run pictures -o features.h5", "pictures"),
    ("layerwise extract run recordings -o features.csv", "features.csv"),
    ("layerwise extract run recordings -o features.h5 --stage 99", "has stages 1 to 4"),
    ("layerwise extract run recordings -o features.h5 --gpu-mem 1kB", "cannot hold the encoder"),
    ("layerwise extract run recordings -o nowhere/features.h5", "nowhere"),
    ("layerwise extract nowhere recordings -o features.h5", "There is no nowhere"),
    ("layerwise export run -o encoder --format onxx", "Did you mean onnx?"),
    ("layerwise export run -o texts", "texts exists"),
    ("layerwise export empty -o encoder", "empty is not a run directory"),
    # caches
    ("layerwise cache ls nowhere", "nowhere does not exist"),
    ("layerwise cache rm nowhere --all", "nowhere is not a run directory"),
    ("layerwise cache rm run", "Say which caches: either --stage S or --all"),
    ("layerwise cache rm run --stage 99", "has stages 1 to 4"),
    ("layerwise cache export empty -o features.npy", "empty holds no caches"),
    ("layerwise cache export run --stage 99 -o features.npy", "run has stages 1 to 4"),
    ("layerwise cache verify nowhere", "nowhere does not exist"),
]

TINY = {
    "data": {"sample_rate": 8000, "window": 1600},
    "net": {"width": 8, "context": 8, "kernels": [10, 8, 4], "strides": [5, 4, 2], "paddings": [2, 2, 1]},
    "objective": {"steps": 3, "anchors": 16},
    "training": {"max_epochs": 1, "batch_size": 8},
}
FEW_LAYOUTS = {"training": {"stages": 4, "batch_size": 2}, "memory": {"recompute": "never"}}
"""So that there is little to rehearse before a budget is refused."""


MINE = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))

def narrow():
    return nn.Linear(2, 4)

def data():
    return [torch.zeros(4, 3)]

def text():
    return "no data"

def broken():
    return 1 / 0

class augmented:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(40, 3)
"""


@pytest.fixture(scope="module")
def world(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the lines of WRONG name, and a finished run of recordings in `run`."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("recordings", "empty", "texts", "corrupt", "dangling", "pictures/cats", "torn/cats", "torn-run"):
        (folder / name).mkdir(parents=True)
    for number in range(8):
        samples = 0.1 * np.random.default_rng(number).standard_normal(2400)
        soundfile.write(folder / "recordings" / f"{number}.wav", samples, 8000)
        Image.new("RGB", (32, 32)).save(folder / "pictures" / "cats" / f"{number}.png")
    (folder / "texts" / "poem.txt").write_text("no sound")
    (folder / "corrupt" / "broken.wav").write_bytes(b"RIFF\xff\xfe no sound")
    (folder / "dangling" / "gone.wav").symlink_to("nowhere.wav")
    (folder / "torn" / "cats" / "torn.png").write_bytes(b"\x89PNG no picture")
    (folder / "torn-run" / "run.json").write_text("{")
    (folder / "file").write_text("")
    (folder / "broken.toml").write_text("[training\n")
    (folder / "tiny.toml").write_text(tomli_w.dumps(TINY))
    (folder / "small.toml").write_text(tomli_w.dumps({**TINY, **FEW_LAYOUTS}))
    (folder / "mine.py").write_text(MINE)
    np.save(folder / "numbers.npy", np.random.default_rng(0).standard_normal((12, 40, 3)))
    np.save(folder / "words.npy", np.array(["no", "numbers"]))
    np.save(folder / "flat.npy", np.arange(5.0))
    shutil.copytree(small_run, folder / "run")
    return folder


def content(folder: Path) -> dict[str, tuple[int, ...] | str | None]:
    """Every path below the folder: size and times of a file, where a link leads, nothing of a folder."""
    found: dict[str, tuple[int, ...] | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name, status = path.relative_to(folder).as_posix(), path.lstat()
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            # Whoever writes to a file changes its times, the one of the inode even where it sets the other one back.
            found[name] = None if path.is_dir() else (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_input_is_one_sentence_and_changes_nothing(
    line: str, words: str, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of a page of the documentation
    before = content(world)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(line)[1:])
    out, err = capfd.readouterr()
    after = content(world)
    for name in after.keys() - before.keys():  # so that the next line finds the world as it was
        shutil.rmtree(world / name) if (world / name).is_dir() else (world / name).unlink(missing_ok=True)
    assert (stopped.value.code, out) == (2, "")
    assert words in err
    assert err.startswith("layerwise: ")
    assert err.rstrip("\n").count("\n") == 0
    assert err.rstrip()[-1] in ".?)"
    assert "Traceback" not in err
    assert after == before

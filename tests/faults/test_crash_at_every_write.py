"""A crash at the n-th write, rename, sync or deletion of a run, for many n; the next start must end with the same bits."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from layerwise.config import Config
from layerwise.data.open import open_data
from layerwise.engines.run import run
from layerwise.nets import shortest_sample
from layerwise.run_store import RunState, RunStore
from layerwise.training.cut import cut_network

SMALLEST = {
    "net.kernels": [10, 8],
    "net.strides": [5, 4],
    "net.paddings": [2, 2],
    "net.context": 0,
    "data.window": 800,
    "training.max_epochs": 1,
    "training.batch_size": 8,
    "cache.block": "16kB",
}
DANGEROUS = ("replace", "fsync", "fdatasync", "pwrite", "unlink", "posix_fallocate")


class Crash(BaseException):
    """Nothing of the package catches it; what Python still does on the way out, a real kill would not do (test_kills)."""


CPU = torch.device("cpu")


def crash_at_call(number: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs work, and raises Crash at its number-th dangerous call and at each one after it. Returns their number."""
    calls = 0

    def counted(function: Callable) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if 0 < number <= calls:
                raise Crash
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patched:
        for name in DANGEROUS:
            patched.setattr(os, name, counted(getattr(os, name)))
        if number:
            with pytest.raises(Crash):
                work()
        else:
            work()
    return calls


def bits(config: Config) -> dict[str, bytes]:
    out, caches = Path(config.out), Path(config.cache.dir) / Path(config.out).name
    weights = {name: value.tobytes() for name, value in load_file(out / "encoder.safetensors").items()}
    return weights | {path.name: path.read_bytes() for path in caches.glob("*.h5")}


@pytest.mark.parametrize("kind", ["run", "from stage", "overwrite", "compressed"])
def test_a_crash_at_any_call_leaves_what_the_next_start_can_use(
    kind: str, tiny_speech: Callable[..., Config], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "recordings"
    few.mkdir()
    for path in sorted(digits.iterdir())[:8]:
        (few / path.name).symlink_to(path)

    def config(name: str) -> Config:
        compression = {"cache.compression": "zstd"} if kind == "compressed" else {}
        return tiny_speech(f"fsdd:{few}", out=str(tmp_path / name), **SMALLEST, **compression)

    # Every start would make the same plans again; made once, what is known of them is remembered.
    plans = cut_network(config("planned"), open_data(config("planned").data, shortest_sample(config("planned"))), CPU)
    monkeypatch.setattr("layerwise.engines.run.cut_network", lambda *_: plans)
    arguments = {"from stage": {"from_stage": 2}, "overwrite": {"overwrite": True}}.get(kind, {})
    begun = kind in ("from stage", "overwrite")
    run(config("undisturbed"))
    expected = bits(config("undisturbed"))
    if begun:
        run(config("counted"))
    total = crash_at_call(0, lambda: run(config("counted"), **arguments), monkeypatch)
    assert total > 20
    # Every call at first and last, where runs are set up and ended; every fifth between, or every third where it packs.
    step = 3 if kind == "compressed" else 5
    for number in sorted({*range(1, 12), *range(12, total - 6, step), *range(total - 6, total + 1)}):
        name = f"crashed-{number}"
        if begun:
            shutil.copytree(tmp_path / "undisturbed", tmp_path / name)
            shutil.copytree(tmp_path / "cache" / "undisturbed", tmp_path / "cache" / name)
            adopt(tmp_path, name)
        crash_at_call(number, lambda name=name: run(config(name), **arguments), monkeypatch)
        run(config(name), **arguments)
        assert bits(config(name)) == expected, f"after a crash at call {number} of {total}"
        left = [path.name for path in RunStore.of(config(name).out, config(name).cache.dir).caches.glob("stage-*.h5.*")]
        assert left == [], f"after a crash at call {number} of {total}"


def adopt(folder: Path, name: str) -> None:
    """Makes a copied run know that it is a run of its own."""
    state = RunState.load(folder / name / "run.json")
    state.caches = str(folder / "cache" / name)
    state.save(folder / name / "run.json")

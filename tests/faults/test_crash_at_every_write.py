"""A crash at the n-th write, rename, sync or deletion of a run, for many n; the next start must end with the same bits."""

import itertools
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import layerwise
from layerwise.config import Config
from layerwise.engines.run import run
from layerwise.run_store import RunStore

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


SYNCS = ("fsync", "fdatasync")
"""A crash at one of these leaves the files that a crash at the call after it leaves."""

Place = tuple[str, tuple[tuple[str, int], ...]]
"""A function, and the lines of the package that have called it."""


class Crash(BaseException):
    """Nothing of the package catches it; what Python still does on the way out, a real kill would not do (test_kills)."""


PACKAGE = str(Path(layerwise.__file__).parent)


def watch_calls(note: Callable[[str], None], work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs work; note is given the name of each dangerous function before it is called."""

    def noted(name: str, function: Callable) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            note(name)
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patched:
        for name in DANGEROUS:
            patched.setattr(os, name, noted(name, getattr(os, name)))
        work()


def places_of_calls(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    """Where each dangerous call of the work stands, in their order."""
    places: list[Place] = []

    def note(name: str) -> None:
        lines = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
        places.append((name, tuple(line for line in lines if line[0].startswith(PACKAGE))))

    watch_calls(note, work, monkeypatch)
    return places


def crash_at_call(number: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs work, and raises Crash at its number-th dangerous call and at each one after it."""
    calls = itertools.count(1)

    def crash(_: str) -> None:
        if next(calls) >= number:
            raise Crash

    with pytest.raises(Crash):
        watch_calls(crash, work, monkeypatch)


def moments(calls: list[Place], known: list[Place]) -> list[int]:
    """Numbers of calls to crash at: the first at each place that is not known, every eighth of all, and the last."""
    places = dict.fromkeys(calls)
    first = {calls.index(place) + 1 for place in places if place not in known and place[0] not in SYNCS}
    return sorted(first | {*range(1, len(calls), 8)} | {len(calls)})


def bits(config: Config) -> dict[str, bytes]:
    out, caches = Path(config.out), Path(config.cache.dir) / Path(config.out).name
    weights = {name: value.tobytes() for name, value in load_file(out / "encoder.safetensors").items()}
    return weights | {path.name: path.read_bytes() for path in caches.glob("*.h5")}


@pytest.mark.parametrize("kind", ["run", "from stage", "overwrite", "compressed", "more epochs"])
def test_a_crash_at_any_call_leaves_what_the_next_start_can_use(
    kind: str, tiny_speech: Callable[..., Config], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "recordings"
    few.mkdir()
    for path in sorted(digits.iterdir())[:4]:
        (few / path.name).symlink_to(path)

    def config(name: str, **changes: object) -> Config:
        return tiny_speech(f"fsdd:{few}", out=str(tmp_path / name), **{**SMALLEST, **changes})

    def copy(name: str) -> None:
        """Of the run that was begun, and its caches."""
        shutil.copytree(tmp_path / "begun", tmp_path / name)
        shutil.copytree(tmp_path / "cache" / "begun", tmp_path / "cache" / name)

    for name in SYNCS:
        monkeypatch.setattr(os, name, lambda descriptor: None)  # a process crashes here, not the machine
    changes = {"compressed": {"cache.compression": "zstd"}, "more epochs": {"training.max_epochs": 2}}.get(kind, {})
    arguments = {"from stage": {"from_stage": 2}, "overwrite": {"overwrite": True}}.get(kind, {})
    begun = kind in ("from stage", "overwrite", "more epochs")
    fresh = places_of_calls(lambda: run(config("fresh")), monkeypatch)
    if begun:
        run(config("begun"))
        copy("undisturbed")
        copy("counted")
    run(config("undisturbed", **changes))
    expected = bits(config("undisturbed"))
    calls = places_of_calls(lambda: run(config("counted", **changes), **arguments), monkeypatch)
    total = len(calls)
    numbers = moments(calls, known=[] if kind == "run" else fresh)
    assert len(numbers) > 10
    for number in numbers:
        name = f"crashed-{number}"
        if begun:
            copy(name)
        crash_at_call(number, lambda name=name: run(config(name, **changes), **arguments), monkeypatch)
        run(config(name, **changes), **arguments)
        assert bits(config(name)) == expected, f"after a crash at call {number} of {total}"
        left = [path.name for path in RunStore.of(config(name).out, config(name).cache.dir).caches.glob("stage-*.h5.*")]
        assert left == [], f"after a crash at call {number} of {total}"

"""Small runs on recordings of noise, the commands that read them, and what each command makes of them."""

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from forked_commands import Ended, call, import_what_commands_import, layerwise
from safetensors.numpy import load_file

OPTIONS = {
    "data.source": "fsdd:data",
    "data.sample_rate": 8000,
    "data.window": 800,
    "net.width": 8,
    "net.context": 0,
    "net.kernels": [10, 8, 4],
    "net.strides": [5, 4, 2],
    "net.paddings": [2, 2, 1],
    "objective.steps": 2,
    "objective.negatives": 4,
    "objective.anchors": 8,
    "training.batch_size": 4,
    "training.max_epochs": 4,
    "training.lr": 1e-3,
    "training.checkpoint_seconds": 0,
    "cache.block": 512,
    "cache.keep": "all",
    "cache.policy": "always",
    "out": "run",
}
"""Three convolutions, a stage each; recordings, run and caches lie in `data`, `run` and `cache` of the present folder."""


def run_command(rounds: int, seed: int = 0, *more: str) -> Callable[[], None]:
    """`layerwise run` with the options above."""
    every = OPTIONS | {"training.rounds": rounds, "training.seed": seed}
    return layerwise(
        "run", *(word for key, value in every.items() for word in ("--set", f"{key}={toml(value)}")), *more
    )


def toml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_recordings(folder: Path) -> None:
    """Two digits by four speakers, each said twice: noise that is smoother from speaker to speaker."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for digit in range(2):
        for number, speaker in enumerate(("george", "jackson", "lucas", "theo")):
            for index in (0, 5):
                noise = rng.standard_normal(rng.integers(1500, 2500))
                for _ in range(number):
                    noise[1:] += noise[:-1]
                noise *= 0.1 / noise.std()
                soundfile.write(folder / f"{digit}_{speaker}_{index}.wav", noise, 8000)


def stop_in(stage: int, round: int, rounds: int, where: str) -> Callable[[], None]:
    """Runs as `run_command` does, and is killed in a stage: where it is in `training`, or in `caching`."""

    def run_and_die() -> None:
        from layerwise.config import resolve
        from layerwise.engines.run import run
        from layerwise.events import CachingProgress, Event, StageStarted, StepDone

        kinds, ending = {
            "training": (StepDone, "stages/*/checkpoint.safetensors"),
            "caching": (CachingProgress, "*.journal"),
        }[where]
        here = False

        def notify(event: Event) -> None:
            nonlocal here
            if isinstance(event, StageStarted):
                here = (event.stage, event.round) == (stage, round)
            if (
                here
                and isinstance(event, kinds)
                and any(any(Path(place).glob(ending)) for place in ("run", "cache/run"))
            ):
                os.kill(os.getpid(), signal.SIGKILL)

        run(resolve(overrides=OPTIONS | {"training.rounds": rounds}), notify=notify)

    return run_and_die


@dataclass(frozen=True, slots=True)
class Command:
    """A command that is called in a folder with a run, and what is looked at when it has succeeded."""

    action: Callable[[], object]
    made: Callable[[Path, Ended], Any]
    outputs: tuple[str, ...] = ()
    """What it may add to the folder."""
    writes: bool = True
    """Whether it may change the run or its caches."""


def commands(rounds: int) -> dict[str, Command]:
    """Every command on the run in the present folder, which has so many rounds."""
    return {
        "run": Command(run_command(rounds), run_made),
        "run --overwrite": Command(run_command(rounds, 0, "--overwrite"), run_made),
        "status": Command(layerwise("status", "run", "--json"), printed_json, writes=False),
        "probe": Command(layerwise("probe", "run", "--label", "speaker", "--json"), probe_made),
        "report": Command(layerwise("report", "run"), report_made),
        "plan": Command(layerwise("plan", "--config", "run/config.toml", "--json"), forecast, writes=False),
        "init": Command(
            layerwise("init", "--config", "run/config.toml", "-o", "new.toml"), init_made, ("new.toml",), False
        ),
        "extract": Command(
            layerwise("extract", "run", "data", "-o", "features.npy"),
            array_made("features"),
            ("features.npy", "features.index.npz"),
            False,
        ),
        "export": Command(layerwise("export", "run", "-o", "handed"), export_made, ("handed",), False),
        "load": Command(load_and_apply("run"), printed, writes=False),
        "cache ls": Command(layerwise("cache", "ls", "run", "--json"), listed_caches, writes=False),
        "cache verify": Command(layerwise("cache", "verify", "run"), printed, writes=False),
        "cache rm": Command(layerwise("cache", "rm", "run", "--all"), caches_left),
        "cache export": Command(
            layerwise("cache", "export", "run", "--stage", "1", "-o", "frames.npy"),
            array_made("frames"),
            ("frames.npy", "frames.index.npz"),
            False,
        ),
    }


def commands_on_handed() -> dict[str, Command]:
    """Those that take the folder `handed` that `layerwise export` has made."""
    return {
        "extract": Command(
            layerwise("extract", "handed", "data", "-o", "features.npy"),
            array_made("features"),
            ("features.npy", "features.index.npz"),
            False,
        ),
        "load": Command(load_and_apply("handed"), printed, writes=False),
        "load file": Command(load_and_apply("handed/encoder.safetensors"), printed, writes=False),
        "plan": Command(layerwise("plan", "--config", "handed/config.toml", "--json"), forecast, writes=False),
        "init": Command(
            layerwise("init", "--config", "handed/config.toml", "-o", "new.toml"), init_made, ("new.toml",), False
        ),
    }


def load_and_apply(place: str) -> Callable[[], None]:
    """Prints a hash of the features of a waveform; an error as the command line does it."""

    def apply() -> None:
        import torch

        import layerwise as package

        try:
            encoder = package.load(place)
            with torch.no_grad():
                features = encoder(torch.linspace(-1, 1, 1600)[None])
        except package.LayerwiseError as error:
            raise SystemExit(_said(error)) from None
        print(hashlib.sha256(features.numpy().tobytes()).hexdigest())

    return apply


def _said(error: Exception) -> int:
    os.write(2, f"layerwise: {error}\n".encode(errors="backslashreplace"))
    return 2


def run_made(place: Path, ended: Ended) -> dict[str, str]:
    """Hashes of the weights of the encoder and of each cache file."""
    weights = load_file(regular(place / "run" / "encoder.safetensors"))
    made = {f"weights of {name}": hashlib.sha256(value.tobytes()).hexdigest() for name, value in weights.items()}
    caches = sorted((place / "cache" / "run").glob("stage-*"))
    return made | {str(path.relative_to(place)): _hash(path) for path in caches}


def probe_made(place: Path, ended: Ended) -> Any:
    """The figures, as printed and as they are kept, without the peak: it depends on which caches can be used."""
    kept = json.loads(regular(place / "run" / "probes" / "speaker.json").read_text())
    return [{key: tree[key] for key in ("label", "classifier", "stages")} for tree in (json.loads(ended.out), kept)]


def report_made(place: Path, ended: Ended) -> tuple[str, str]:
    """The page without its drawings, and these."""
    page = regular(place / "run" / "report.html").read_text()
    drawings = re.compile(r"<svg.*?</svg>", re.DOTALL)
    return drawings.sub("", page), " ".join(drawings.findall(page))


def init_made(place: Path, ended: Ended) -> str:
    return regular(place / "new.toml").read_text()


def export_made(place: Path, ended: Ended) -> dict[str, str]:
    return {path.name: _hash(path) for path in sorted((place / "handed").iterdir())}


def array_made(name: str) -> Callable[[Path, Ended], dict[str, Any]]:
    """Of NAME.npy and NAME.index.npz: their arrays."""

    def made(place: Path, ended: Ended) -> dict[str, Any]:
        with np.load(regular(place / f"{name}.index.npz")) as index:
            arrays = {key: index[key].tolist() for key in index.files}
        return arrays | {"features": _hash(place / f"{name}.npy")}

    return made


def listed_caches(place: Path, ended: Ended) -> dict[str, Any]:
    """Entry of each file, by its place."""
    return {os.path.relpath(place / entry.pop("path"), place): entry for entry in json.loads(ended.out)}


def caches_left(place: Path, ended: Ended) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in (place / "cache").rglob("*.h5*"))


def forecast(place: Path, ended: Ended) -> Any:
    """Without the host's memory, of which the process that forecasts takes a part itself, without the hours, for which it
    measures the device, and without what it says of the disk."""
    tree = json.loads(ended.out)
    del tree["notes"], tree["hours"]
    for each in (tree, *tree["stages"]):
        del each["host_bytes"]
    return tree


def printed_json(place: Path, ended: Ended) -> Any:
    return json.loads(ended.out)


def printed(place: Path, ended: Ended) -> str:
    return ended.out


def regular(path: Path) -> Path:
    """The path, or a link to one. Raises ValueError where it is not a file of a sane size, which must not be read then."""
    if not path.is_file() or path.stat().st_size > 2**26:
        raise ValueError(f"{path} is no plain file")
    return path


def _hash(path: Path) -> str:
    return hashlib.sha256(regular(path).read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class World:
    """Folders side by side: recordings, runs as they were made, and the arena, into which one of these is copied."""

    base: Path
    states: Mapping[str, Path]
    """Name to a folder as `run` and `cache`, or `handed`, lie in it."""

    @property
    def arena(self) -> Path:
        return self.base / "arena"

    @property
    def streams(self) -> Path:
        return self.base / "streams"

    def enter(self, state: str) -> Path:
        """The arena, with a copy of this state in it and nothing else."""
        shutil.rmtree(self.arena, ignore_errors=True)
        shutil.copytree(self.states[state], self.arena, symlinks=True)
        (self.arena / "data").symlink_to(self.base / "data")
        return self.arena


def plan_run(data: Path) -> None:
    """Plans the small run in this process, so that no fork of it need work out what its stages take."""
    from layerwise.config import resolve
    from layerwise.data.open import open_data
    from layerwise.nets import shortest_sample
    from layerwise.stop import StopFlag
    from layerwise.training.budget import fit_to_budget
    from layerwise.training.cache_plan import CachePlan
    from layerwise.training.cut import cut_network

    config, device = resolve(overrides=OPTIONS | {"data.source": f"fsdd:{data}"}), torch.device("cpu")
    stages = cut_network(config, open_data(config.data, shortest_sample(config)), device)
    fit_to_budget(config, stages, CachePlan((True,) * len(stages)), device, set(), StopFlag())


Makes = Mapping[str, Sequence[Callable[[], object]]]


def makes(rounds: int) -> Makes:
    """Name of a state to what makes it: finished, killed in training or in caching, and finished with another seed."""
    probe_and_report = (commands(rounds)["probe"].action, commands(rounds)["report"].action)
    return {
        "finished": (run_command(rounds), *probe_and_report),
        "training": (stop_in(2, rounds, rounds, "training"),),
        "caching": (stop_in(2, rounds, rounds, "caching"),),
        "other": (run_command(rounds, 1), *probe_and_report),
    }


def make_world(base: Path, makes: Makes) -> World:
    """All runs are made in the arena, at the paths that their copies have. `handed` is exported from the finished one; `empty`
    holds nothing."""
    world = World(base, {name: base / "states" / name for name in (*makes, "handed", "empty")})
    write_recordings(base / "data")
    world.streams.mkdir()
    world.states["empty"].mkdir(parents=True)
    for state, actions in makes.items():
        world.arena.mkdir()
        (world.arena / "data").symlink_to(base / "data")
        for action in actions:
            ended = call(action, world.arena, world.streams)
            assert ended.code in (0, -signal.SIGKILL), ended.err
        (world.arena / "data").unlink()
        world.arena.rename(world.states[state])
        if state == "finished":
            import_what_commands_import(world.streams)
            plan_run(base / "data")
    arena = world.enter("finished")
    ended = call(layerwise("export", "run", "-o", "handed"), arena, world.streams)
    assert ended.code == 0, ended.err
    world.states["handed"].mkdir()
    (arena / "handed").rename(world.states["handed"] / "handed")
    return world

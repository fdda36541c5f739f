"""A run on disk: the name of every file of it, its locks, and all that is read, written and deleted there."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.config import Config, load
from layerwise.errors import RunError
from layerwise.files import exclusive, is_locked, write_atomically, write_json
from layerwise.run_store.state import RunState, StageRecord

HANDOVER_SECONDS = 120
"""How long a task waits for another process to let go of its round: one that was killed may still be on its way out,
and over a network a lock outlives a machine by a minute or two."""

_CACHE_NAME = re.compile(r"stage-([1-9]\d*)\.h5(\.part|\.journal(?:-[1-9]\d*)?|\.packing|\.copying)?")


@dataclass(frozen=True, slots=True)
class CacheFile:
    """A file that a run has written into its folder of caches."""

    path: Path
    stage: int
    is_sealed: bool
    """By its name."""
    bytes: int
    """On this disk."""


def cache_files(folder: Path) -> list[CacheFile]:
    """All of them; files of other names are a user's own."""
    files = []
    for path in folder.glob("stage-*.h5*"):
        if name := _CACHE_NAME.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # gone by now
                files.append(CacheFile(path, int(name[1]), name[2] is None, path.lstat().st_blocks * 512))
    return files


@dataclass(unsafe_hash=True)
class RunStore:
    """All files of one run, or of one of its rounds: their paths, locks and contents."""

    out: Path
    """The run directory."""
    caches: Path
    """The folder of its activation caches."""

    def __post_init__(self) -> None:
        out, caches = self.out, self.caches
        self.state = out / "run.json"
        self.config = out / "config.toml"
        self.log = out / "log.txt"
        self.machine = out / "machine.json"
        """The machine of the newest start."""
        self.restarts = out / "restarts.json"
        """Where the run stood when it was last queued again, see engines.requeue."""
        self.report = out / "report.html"
        self.plots = out / "plots"
        """The figures of the report, each as .svg and .png."""
        self.jobs = out / "jobs"
        """Batch scripts and logs of a run on Slurm."""
        self.encoder = out / "encoder.safetensors"
        self.probes = out / "probes"
        self.lock = out / "lock"
        self.caches_lock = caches / "lock"
        """Held as well: runs of the same name in other folders have this folder of caches, too."""
        self.task_lock = out / "task.lock"
        """Held by the process that performs a task of this round."""
        self.cache_owner = caches / "run-id"
        """Holds the id of the run that the caches belong to."""

    @classmethod
    def of(cls, out: str | Path, cache_dir: str | Path) -> "RunStore":
        """The caches of runs/NAME lie in CACHE_DIR/NAME."""
        try:
            out = Path(out).expanduser()
            return cls(out, (Path(cache_dir).expanduser() / out.resolve().name).resolve())
        except RuntimeError as error:
            raise RunError(f"--out {out} or --cache-dir {cache_dir} cannot be found: {error}.") from None

    def round(self, round: int, rounds: int) -> "RunStore":
        """The last round is the run itself; an earlier one is a run directory below it, with caches of its own."""
        if round == rounds:
            return self
        return RunStore(self.out / "rounds" / str(round), self.caches / f"round-{round}")

    def furthest_round(self, rounds: int) -> "RunStore":
        """The round that is ahead of all others: the first, or the last one where those before it were deleted."""
        first = self.round(1, rounds)
        return first if first.exists else self

    def stage(self, stage: int) -> Path:
        return self.out / "stages" / str(stage)

    def stage_config(self, stage: int) -> Path:
        """The resolved options that the stage was trained with."""
        return self.stage(stage) / "config.toml"

    def weights(self, stage: int) -> Path:
        return self.stage(stage) / "weights.safetensors"

    def checkpoint(self, stage: int) -> Path:
        return self.stage(stage) / "checkpoint.safetensors"

    def metrics(self, stage: int) -> Path:
        return self.stage(stage) / "metrics.jsonl"

    def memory(self, stage: int) -> Path:
        return self.stage(stage) / "memory.jsonl"

    def cache(self, stage: int) -> Path:
        return self.caches / f"stage-{stage}.h5"

    @property
    def exists(self) -> bool:
        """Whether there is a run.json."""
        return self.state.exists()

    def load_state(self) -> RunState:
        """Raises RunError where there is no readable run.json of this version."""
        return RunState.load(self.state)

    def save_state(self, state: RunState) -> None:
        """Replaces run.json atomically. Raises RunError."""
        state.save(self.state)

    def state_bytes(self) -> bytes | None:
        """run.json as it is, to tell whether another process has changed it; None where there is none."""
        return self.state.read_bytes() if self.exists else None

    def read_config(self) -> Config:
        """The options of the newest start. Raises ConfigError."""
        return load(self.config)

    def write_config(self, config: Config) -> None:
        """Replaces config.toml atomically. Raises RunError."""
        write_atomically(self.config, config.to_toml().encode())

    def read_stage_config(self, stage: int) -> Config:
        """The options that the stage was trained with. Raises ConfigError."""
        return load(self.stage_config(stage))

    def write_stage_config(self, stage: int, config: Config) -> None:
        """Replaces the file atomically. Raises RunError."""
        write_atomically(self.stage_config(stage), config.to_toml().encode())

    def write_machine(self, machine: dict[str, Any]) -> None:
        """Replaces machine.json atomically. Raises RunError."""
        write_json(self.machine, machine)

    def probe(self, name: str) -> Path:
        return self.probes / f"{name}.json"

    def write_probe(self, name: str, result: dict[str, Any]) -> None:
        """Replaces probes/NAME.json atomically. Raises RunError."""
        write_json(self.probe(name), result)

    def read_restarts(self) -> dict[str, Any]:
        """What was noted last: where the run stood, and how many starts in a row ended there. Empty where it is unreadable."""
        try:
            noted = json.loads(self.restarts.read_text(encoding="utf-8"))
            return {"stands": noted["stands"], "in_vain": int(noted["in_vain"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def write_restarts(self, stands: list[Any], in_vain: int) -> None:
        """Replaces restarts.json atomically. Raises RunError."""
        write_json(self.restarts, {"stands": stands, "in_vain": in_vain})

    def write_caches_owner(self, run_id: str) -> None:
        """Raises RunError."""
        write_atomically(self.cache_owner, run_id.encode())

    def refuse_foreign_folder(self) -> None:
        """Raises RunError where the run directory would mix with files that are not a run's."""
        if self.out.exists() and not self.out.is_dir():
            raise RunError(f"--out {self.out} is a file; name a folder.")
        if self.out.is_dir() and not self.exists:
            ours = {"lock", "task.lock", "rounds", "run.json.tmp"}
            others = sorted(entry.name for entry in self.out.iterdir() if entry.name not in ours)
            if others:
                raise RunError(f"--out {self.out} holds something else ({others[0]}); name a new or empty folder.")

    def refuse_foreign_caches(self, state: RunState | None) -> None:
        """Raises RunError where the folder for the caches holds another run's; `state` is None for a new run."""
        owner = self._caches_owner()
        if owner is None:
            foreign = state is None and any(self.caches.glob("stage-*.h5*"))
        else:
            foreign = state is None or owner != state.run_id
        if foreign:
            raise RunError(
                f"{self.caches} holds caches of another run of the same name; give another --out name or --cache-dir, or "
                "delete that folder if its run is gone."
            )

    def _caches_owner(self) -> str | None:
        """Id of the run that the caches belong to; None where the folder does not say."""
        return self.cache_owner.read_text(encoding="utf-8") if self.cache_owner.exists() else None

    @property
    def is_running(self) -> bool:
        """Whether a process holds the run."""
        return is_locked(self.lock)

    def worker(self) -> str | None:
        """Who performs a task of this round; None where nobody does."""
        return self.task_lock.read_text(encoding="utf-8").strip() if is_locked(self.task_lock) else None

    def write_worker(self, name: str) -> None:
        """Notes who holds the task lock, for `layerwise status`; to be called while it is held."""
        self.task_lock.write_text(f"{name}\n", encoding="utf-8")

    @contextmanager
    def lock_run(self) -> Iterator[None]:
        """Keeps other starts from the run directory and from its caches. Raises RunError where another process holds one."""
        busy = RunError(f"Another process is running {self.out}; wait for it, or name another --out.")
        caches_busy = RunError(
            f"Another run of the same name is using {self.caches}; wait for it, or give another --out name or --cache-dir."
        )
        with exclusive(self.lock, busy), exclusive(self.caches_lock, caches_busy):
            yield

    @contextmanager
    def lock_all_tasks(self, rounds: int) -> Iterator[None]:
        """Keeps tasks from their rounds, those of an earlier start included. Raises RunError where one is in hand."""
        locks = {self.round(number, rounds).task_lock for number in range(1, rounds + 1)}
        locks |= {folder / self.task_lock.name for folder in self._round_folders()}
        with ExitStack() as held:
            for lock in sorted(locks):
                busy = RunError(
                    f"A task of {lock.parent} is being performed, by a batch job or a worker; wait for it, or cancel it."
                )
                held.enter_context(exclusive(lock, busy))
            yield

    def lock_task(self, busy: RunError, poll: Callable[[], None]) -> AbstractContextManager[None]:
        """Within a round one task follows another, so whoever performs one has its files to itself.

        poll: is called while it waits, and may raise. Raises `busy` where another process keeps the round.
        """
        return exclusive(self.task_lock, busy, HANDOVER_SECONDS, poll)

    @contextmanager
    def lock_stopped(self) -> Iterator[list[tuple["RunStore", RunState]]]:
        """Holds a run that nobody is running; gives its last round, and those before it that are there, with their states.

        Raises RunError where the run is running or a run.json cannot be read.
        """
        busy = RunError(f"{self.out} is running; stop it first.")
        earlier = [open_run(folder) for folder in self._round_folders() if (folder / "run.json").exists()]
        with ExitStack() as held:
            for lock in (self.lock, self.task_lock, *(store.task_lock for store, _ in earlier)):
                held.enter_context(exclusive(lock, busy))
            yield [(self, self.load_state()), *earlier]

    def delete_cache_files(self, files: Iterable[CacheFile]) -> int:
        """Gives the bytes that are free now on the disk."""
        freed = 0
        for file in files:
            file.path.unlink(missing_ok=True)
            freed += file.bytes
        return freed

    def delete_cache(self, stage: int) -> int:
        """Deletes the cache of a stage, sealed or not. Gives the bytes that are free now."""
        return self.delete_cache_files(file for file in cache_files(self.caches) if file.stage == stage)

    def delete_caches_owner(self) -> None:
        """To be called when no cache is left that could be taken for another run's."""
        self.cache_owner.unlink(missing_ok=True)

    def delete_stage(self, stage: int) -> None:
        """Deletes what a stage has written, and what was made of it: the encoder and the probes."""
        self.encoder.unlink(missing_ok=True)
        self.delete_cache(stage)
        for folder in (self.stage(stage), self.probes):
            shutil.rmtree(folder, ignore_errors=True)

    def delete_pending_stages(self, state: RunState) -> None:
        """Of stages that are not begun: a stage leaves "pending" before it writes its first file, so these are left over."""
        for record in state.stages:
            if record.status == "pending":
                self.delete_stage(record.stage)

    def delete_run(self, state: RunState) -> None:
        """Deletes what a run of this state writes, and nothing else: a user's own notes stay. run.json stays to the end.

        Its caches may lie elsewhere than this start's, and are deleted only where they are its own.
        """
        state.stages = [StageRecord(record.stage) for record in state.stages]
        self.save_state(state)
        old = RunStore(self.out, Path(state.caches))
        if old._caches_owner() == state.run_id:
            for record in state.stages:
                old.delete_stage(record.stage)
            old.delete_caches_owner()
        for folder in (old.out / "stages", old.probes, old.plots):
            shutil.rmtree(folder, ignore_errors=True)
        for path in (old.encoder, old.config, old.log, old.machine, old.report):
            path.unlink(missing_ok=True)
        for folder in old._round_folders():
            with contextlib.suppress(RunError):  # nothing readable is in it
                earlier, state_of_earlier = open_run(folder)
                earlier.delete_run(state_of_earlier)
        for entry in (old.out / "rounds").glob("*/*"):
            if entry.name != old.task_lock.name:  # whoever waits for it must meet the next to hold it
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _round_folders(self) -> list[Path]:
        """Of rounds before the last one, those of an earlier start with more rounds included."""
        return sorted((self.out / "rounds").glob("*"))


def open_run(out: Path) -> tuple[RunStore, RunState]:
    """Paths and state of an existing run. Raises RunError."""
    if not out.is_dir():
        raise RunError(f"There is no run directory {out}; start one with: layerwise run --out {out}.")
    state = RunState.load(out / "run.json")
    return RunStore(out, Path(state.caches)), state

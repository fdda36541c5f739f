"""A run on disk: the name of every file of it, its locks, and all that is read, written and deleted there.

Files of these names alone are deleted, and never behind a link.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerwise.config import Config
from layerwise.errors import RunError
from layerwise.files import exclusive, is_locked, open_own, read_bytes, read_text, write_atomically
from layerwise.records import read_record, write_record
from layerwise.run_store.state import CacheOwner, ProbeResult, Restarts, RunState, StageRecord

HANDOVER_SECONDS = 120
"""How long a task waits for another process to let go of its round: one that was killed may still be on its way out,
and over a network a lock outlives a machine by a minute or two."""


_CACHE_NAME = re.compile(r"stage-([1-9]\d*)\.h5(\.part|\.journal(?:-[1-9]\d*)?|\.packing|\.copying)?")

STAGE_FILES = tuple(
    name + end
    for name in ("weights.safetensors", "checkpoint.safetensors", "metrics.jsonl", "memory.jsonl")
    for end in ("", ".tmp")
)
CURVES, CURVE_FILES = "tensorboard", ("events.out.tfevents.*",)
PLOT_FILES = tuple(
    name + end for name in ("losses", "memory", "caches", "errors-*", "confusion-*") for end in (".svg", ".png")
)
"""Patterns of the names that a run gives to its files."""


@dataclass(frozen=True, slots=True)
class CacheFile:
    """A file that a run has written into its folder of caches."""

    path: Path
    stage: int
    is_sealed: bool
    """By its name."""
    bytes: int
    """On this disk."""


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
        self.workers = out / "workers"
        """Logs of worker processes."""
        self.encoder = out / "encoder.safetensors"
        self.first_weights = out / "first_weights.safetensors"
        """What the training begins with, where the seed does not say it."""
        self.probes = out / "probes"
        self.lock = out / "lock"
        self.caches_lock = caches / "lock"
        """Held as well: runs of the same name in other folders have this folder of caches, too."""
        self.task_lock = out / "task.lock"
        """Held by the process that performs a task of this round."""
        self.cache_owner = caches / "owner.json"
        """Says which run the caches belong to, see `CacheOwner`."""

    @classmethod
    def of(cls, out: str | Path, cache_dir: str | Path) -> "RunStore":
        """The caches of runs/NAME lie in CACHE_DIR/NAME; those of a run that was renamed keep their place there."""
        try:
            out = Path(out).expanduser()
            store = cls(out, Path(cache_dir).expanduser().resolve() / out.resolve().name)
        except (RuntimeError, OSError) as error:
            raise RunError(f"--out {out} or --cache-dir {cache_dir} cannot be found: {error}.") from None
        recorded = store.recorded_caches(store.load_state()) if store.exists else None
        return cls(out, recorded) if recorded and recorded.parent == store.caches.parent else store

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

    def weights(self, stage: int) -> Path:
        return self.stage(stage) / "weights.safetensors"

    def checkpoint(self, stage: int) -> Path:
        return self.stage(stage) / "checkpoint.safetensors"

    def metrics(self, stage: int) -> Path:
        return self.stage(stage) / "metrics.jsonl"

    def memory(self, stage: int) -> Path:
        return self.stage(stage) / "memory.jsonl"

    def curves(self, stage: int) -> Path:
        """Folder of the files in which TensorBoard shows it."""
        return self.stage(stage) / CURVES

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
        return read_bytes(self.state) if self.exists else None

    def write_config(self, config: Config) -> None:
        """Replaces config.toml, which is for people; what the run goes by stands in run.json. Raises RunError."""
        write_atomically(self.config, config.to_toml().encode())

    def write_machine(self, machine: dict[str, Any]) -> None:
        """Replaces machine.json atomically. Raises RunError."""
        write_record(self.machine, machine)

    def probe(self, name: str) -> Path:
        return self.probes / f"{name}.json"

    def read_probes(self, state: RunState) -> list[ProbeResult]:
        """In the order of their names, which they have as labels. Raises RunError where one is damaged, or not of this run."""
        found = []
        for path in sorted(self.probes.glob("*.json")):
            probe = read_record(ProbeResult, path)
            if [each.weights for each in probe.stages] != [state.weights_of(each.stage) for each in probe.stages]:
                raise RunError(
                    f"{path} tells of other weights than this run's; probe again with: layerwise probe {self.out} --label "
                    f"{probe.label}, or move it away."
                )
            found.append(replace(probe, label=path.stem))
        return found

    def write_probe(self, name: str, result: ProbeResult) -> None:
        """Replaces probes/NAME.json atomically. Raises RunError."""
        write_record(self.probe(name), result)

    def read_restarts(self) -> Restarts | None:
        """None where nothing readable was noted."""
        try:
            return read_record(Restarts, self.restarts)
        except RunError:
            return None

    def write_restarts(self, restarts: Restarts) -> None:
        """Replaces restarts.json atomically. Raises RunError."""
        write_record(self.restarts, restarts)

    def write_caches_owner(self, run_id: str) -> None:
        """Raises RunError."""
        write_record(self.cache_owner, CacheOwner(run_id, os.path.relpath(self.out.resolve(), self.caches)))

    def recorded_caches(self, state: RunState) -> Path | None:
        """The folder that run.json names, if it is there and says itself that it is this run's."""
        folder = self.named_caches(state)
        return folder if folder and RunStore(self.out, folder).has_caches_of(state) else None

    def named_caches(self, state: RunState) -> Path | None:
        """The folder that run.json names, whosoever it is; None where none is there."""
        try:
            folder = self.out.resolve() / state.caches
            folder = folder.parent.resolve() / folder.name
        except (RuntimeError, OSError, ValueError):  # links in a circle, or a name that is none
            return None
        return folder if folder.is_dir() and not folder.is_symlink() else None

    def has_caches_of(self, state: RunState) -> bool:
        """Whether the folder of the caches says that it belongs to this run, and no other folder with that run claims it."""
        try:
            owner = self._caches_owner()
        except RunError:
            return False
        if owner is None or owner.run_id not in (state.run_id, state.copy_of):
            return False
        named = self.caches / owner.run
        if _is_same(named, self.out) or not os.path.lexists(named / "run.json"):
            return True
        try:
            other = RunState.load(named / "run.json")
        except RunError:
            return False
        return other.run_id != owner.run_id or not _is_same(named / other.caches, self.caches)

    @property
    def inode(self) -> int:
        """Of the run directory: a copy has another one, and what is moved on its disk keeps it."""
        return self.out.stat().st_ino

    def is_copy(self, state: RunState) -> bool:
        """Whether this folder is not the one in which the run was started last: a copy, or moved to another disk."""
        return self.inode != state.inode

    def refuse_foreign_folder(self) -> None:
        """Raises RunError where the run directory would mix with files that are not a run's."""
        if self.out.exists() and not self.out.is_dir():
            raise RunError(f"--out {self.out} is a file; name a folder.")
        if self.out.is_dir() and not self.exists:
            ours = {"lock", "task.lock", "rounds", "run.json.tmp", *(path.name for path in self._first_weights_files)}
            others = sorted(entry.name for entry in self.out.iterdir() if entry.name not in ours)
            if others:
                raise RunError(f"--out {self.out} holds something else ({others[0]}); name a new or empty folder.")

    def refuse_foreign_caches(self, state: RunState | None) -> None:
        """Raises RunError where the folder for the caches holds another run's; `state` is None for a new run."""
        if self._caches_owner() is None:
            foreign = state is None and any(self.caches.glob("stage-*.h5*"))
        else:
            foreign = state is None or not self.has_caches_of(state)
        if foreign:
            raise RunError(
                f"{self.caches} holds caches of another run of the same name{self.whose_caches()}; give another --out name "
                "or --cache-dir, or delete that folder if its run is gone."
            )

    def whose_caches(self) -> str:
        """Words on the run that the folder of the caches names, to go behind another word; empty where it names none."""
        owner = self._caches_owner()
        return f" (that in {(self.caches / owner.run).resolve()})" if owner else ""

    def refuse_links(self) -> None:
        """Raises RunError where a folder of the run, or of its caches, is a link: nothing is written or deleted behind one."""
        folders = [self.out / name for name in ("stages", "rounds", "probes", "plots", "jobs", "workers")]
        stages = _numbered(self.out / "stages")
        folders += [self.caches, *stages, *(stage / CURVES for stage in stages)]
        folders += [*_numbered(self.out / "rounds"), *self.caches.glob("round-*")]
        for folder in folders:
            if folder.is_symlink():
                raise RunError(
                    f"{folder} is a link, and a run keeps its files in its own folders; put the folder in its place."
                )

    def _caches_owner(self) -> CacheOwner | None:
        """None where the folder does not say."""
        return read_record(CacheOwner, self.cache_owner) if self.cache_owner.exists() else None

    @property
    def is_running(self) -> bool:
        """Whether a process holds the run."""
        return is_locked(self.lock)

    def worker(self) -> str | None:
        """Who performs a task of this round; None where nobody does."""
        return read_text(self.task_lock).strip() if is_locked(self.task_lock) else None

    def write_worker(self, name: str) -> None:
        """Notes who holds the task lock, for `layerwise status`; to be called while it is held."""
        with open_own(self.task_lock) as file:
            file.truncate()
            file.write(f"{name}\n".encode())

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

    def _lock_caches(self) -> AbstractContextManager[None]:
        """Keeps others from the folder of the caches, where there is one."""
        busy = RunError(f"Another process is using {self.caches}; wait for it.")
        return exclusive(self.caches_lock, busy) if self.caches.is_dir() else nullcontext()

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
            held.enter_context(self._lock_caches())
            yield [(self, self.load_state()), *earlier]

    def delete_cache_files(self, files: Iterable[CacheFile]) -> int:
        """Gives the bytes that are free now on the disk."""
        freed = 0
        for file in files:
            _delete(file.path)
            freed += file.bytes
        return freed

    def delete_cache(self, stage: int) -> int:
        """Deletes the cache of a stage, sealed or not. Gives the bytes that are free now."""
        return self.delete_cache_files(file for file in cache_files(self.caches) if file.stage == stage)

    def delete_caches_owner(self) -> None:
        """To be called when no cache is left that could be taken for another run's."""
        _delete(self.cache_owner)

    @property
    def _first_weights_files(self) -> tuple[Path, Path]:
        return self.first_weights, self.first_weights.with_suffix(".safetensors.tmp")

    def delete_first_weights(self) -> None:
        """Also what a start that was killed has left of them."""
        for path in self._first_weights_files:
            _delete(path)

    def _delete_outputs(self, stage: int) -> None:
        """Deletes what a stage puts out, and what was made of it: the encoder and the probes."""
        _delete(self.encoder)
        self.delete_cache(stage)
        self._delete_probes()

    def _delete_probes(self) -> None:
        """A user may keep other files beside them."""
        for path in self.probes.glob("*.json"):
            with contextlib.suppress(RunError):
                read_record(ProbeResult, path)
                _delete(path)
        _delete_files(self.probes, ("*.json.tmp",))

    def delete_pending_stages(self, state: RunState) -> None:
        """Of stages that are not begun: a stage leaves "pending" before it writes its first file, so these are left over.

        Where one is to be trained further, what that goes on from stays.
        """
        for record in state.stages:
            if record.status == "pending":
                self._delete_outputs(record.stage)
                if record.earlier is None:
                    _delete_files_of_stage(self.stage(record.stage))

    def delete_run(self, state: RunState) -> None:
        """Deletes what a run of this state writes, and nothing else: a user's own notes stay. run.json stays to the end.

        Its caches may lie elsewhere than this start's, and are deleted only where they are its own. Raises RunError where
        another process uses them.
        """
        state.stages = [StageRecord(record.stage) for record in state.stages]
        self.save_state(state)
        own = self.caches if self.has_caches_of(state) else None
        for caches in filter(None, {own, self.recorded_caches(state)}):
            old = RunStore(self.out, caches)
            with nullcontext() if caches == self.caches else old._lock_caches():
                old.delete_cache_files(cache_files(caches))
                old.delete_caches_owner()
        self._delete_files_of_stages()
        for folder in self._round_folders():
            with contextlib.suppress(RunError):  # nothing readable is in it
                earlier, state_of_earlier = open_run(folder)
                earlier.delete_run(state_of_earlier)
            RunStore(folder, self.caches)._delete_files_of_stages()
            # The lock stays: whoever waits for it must meet the next to hold it.
            _delete_files(folder, ("run.json", "run.json.tmp"))

    def _delete_files_of_stages(self) -> None:
        for folder in _numbered(self.out / "stages"):
            _delete_files_of_stage(folder)
        self._delete_probes()
        for folder, names in ((self.out / "stages", ()), (self.plots, PLOT_FILES)):
            _delete_files(folder, names)
        self.delete_first_weights()
        for path in (self.encoder, self.config, self.log, self.machine, self.report):
            _delete(path)

    def _round_folders(self) -> list[Path]:
        """Of rounds before the last one, those of an earlier start with more rounds included."""
        return _numbered(self.out / "rounds")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def open_run(out: Path) -> tuple[RunStore, RunState]:
    """Paths and state of an existing run; its caches are those that say that they are its own. Raises RunError."""
    if not out.is_dir():
        raise RunError(f"There is no run directory {out}; start one with: layerwise run --out {out}.")
    here = RunStore(out, out / "caches")  # where there never are any
    here.refuse_links()
    state = here.load_state()
    return RunStore(out, here.recorded_caches(state) or here.caches), state


def cache_files(folder: Path) -> list[CacheFile]:
    """All of them; files of other names are a user's own."""
    files = []
    for path in folder.glob("stage-*.h5*"):
        name = _CACHE_NAME.fullmatch(path.name)
        if name and (path.is_symlink() or not path.is_dir()):
            with contextlib.suppress(FileNotFoundError):  # gone by now
                files.append(CacheFile(path, int(name[1]), name[2] is None, path.lstat().st_blocks * 512))
    return files


def _delete_files(folder: Path, patterns: Iterable[str]) -> None:
    """Deletes the files of these names, and the folder where nothing else is in it. Links are not followed."""
    if folder.is_symlink():
        return
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        _delete(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _delete_files_of_stage(folder: Path) -> None:
    if not folder.is_symlink():
        _delete_files(folder / CURVES, CURVE_FILES)
    _delete_files(folder, STAGE_FILES)


def _delete(path: Path) -> None:
    """Deletes a file or a link. A folder of that name is not the run's, and stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)


def _numbered(folder: Path) -> list[Path]:
    """The folders, and links, in it whose names are numbers."""
    children = sorted(folder.glob("*")) if folder.is_dir() and not folder.is_symlink() else []
    return [child for child in children if child.name.isdecimal()]

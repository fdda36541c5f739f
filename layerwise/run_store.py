"""A run on disk: the name of every file of a run, and its state in run.json."""

import json
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from layerwise.errors import RunError
from layerwise.files import write_atomically

VERSION = 3

Status = Literal["pending", "training", "caching", "done"]


@dataclass(frozen=True, slots=True)
class RunStore:
    """Every path of one run."""

    out: Path
    """The run directory."""
    caches: Path
    """The folder of its activation caches."""

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
        return first if first.state.exists() else self

    @property
    def state(self) -> Path:
        return self.out / "run.json"

    @property
    def config(self) -> Path:
        return self.out / "config.toml"

    @property
    def log(self) -> Path:
        return self.out / "log.txt"

    @property
    def machine(self) -> Path:
        """The machine of the newest start."""
        return self.out / "machine.json"

    @property
    def restarts(self) -> Path:
        """Where the run stood when it was last queued again, see engines.restarts."""
        return self.out / "restarts.json"

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    @property
    def plots(self) -> Path:
        """The figures of the report, each as .svg and .png."""
        return self.out / "plots"

    @property
    def lock(self) -> Path:
        return self.out / "lock"

    @property
    def caches_lock(self) -> Path:
        """Held as well: runs of the same name in other folders have this folder of caches, too."""
        return self.caches / "lock"

    @property
    def jobs(self) -> Path:
        """Batch scripts and logs of a run on Slurm."""
        return self.out / "jobs"

    @property
    def task_lock(self) -> Path:
        """Held by the process that performs a task of this round."""
        return self.out / "task.lock"

    @property
    def encoder(self) -> Path:
        return self.out / "encoder.safetensors"

    @property
    def cache_owner(self) -> Path:
        """Holds the id of the run that the caches belong to."""
        return self.caches / "run-id"

    @property
    def probes(self) -> Path:
        return self.out / "probes"

    def probe(self, label: str) -> Path:
        return self.probes / f"{label}.json"

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


@dataclass(slots=True)
class StageRecord:
    """What run.json says of a stage; sizes in bytes."""

    stage: int
    status: Status = "pending"
    epochs: int = 0
    converged: bool | None = None
    best_loss: float | None = None
    peak_bytes: int | None = None
    """The larger of the two peaks below."""
    train_peak_bytes: int | None = None
    train_peak_by_kind: dict[str, int] | None = None
    """What the training peak of the newest start was made of: parameters, gradients, optimizer, activations."""
    cache_peak_bytes: int | None = None
    allocator_bytes: int | None = None
    """On CUDA: most that the allocator has held for the stage, in use or in reserve."""
    driver_bytes: int | None = None
    """On CUDA: what the driver reported for the process, the context included, after training or after caching."""
    micro_batch: int | None = None
    input: str | None = None
    """Where its samples come from: data, cache, or recompute where the stage below is not cached."""
    cached: bool | None = None
    """Whether its outputs are to be cached; None until the stage is begun."""
    cache: str | None = None
    """Where its cache lies; None where there is none, or none any more."""
    cache_bytes: int | None = None
    fingerprint: str | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class RunState:
    """run.json."""

    stages: list[StageRecord]
    data_identity: str
    budget_bytes: int | None
    device: str
    caches: str
    """Absolute path of the folder of the caches."""
    cut: list[int]
    """Layers in each stage."""
    network: str = ""
    """Identity of a network that is none of the paper's; empty where options say all about it."""
    optimization: str = ""
    """Identity of an optimizer that was given as an object."""
    from_stage: int | None = None
    """The `--from-stage` that is being carried out; None where there is none or it is finished."""
    kept_stages: int = 0
    """Stages 1 to this kept the training options of an earlier start when `--from-stage` retrained those above."""
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    version: int = VERSION

    @property
    def done(self) -> bool:
        return all(record.status == "done" for record in self.stages)

    def record(self, stage: int) -> StageRecord:
        return self.stages[stage - 1]

    def source(self, stage: int) -> int:
        """The stage whose cache is the nearest below `stage`; 0 for the data."""
        return next((below for below in range(stage - 1, 0, -1) if self.record(below).cached), 0)

    def save(self, path: Path) -> None:
        """Replaces run.json atomically. Raises RunError."""
        write_atomically(path, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "RunState":
        """Raises RunError where there is no readable run.json of this version."""
        try:
            tree: dict[str, Any] = json.loads(path.read_text())
            if tree["version"] != VERSION:
                raise RunError(
                    f"{path} is of version {tree['version']}; this layerwise reads version {VERSION}. Go on "
                    "with the layerwise that began it, or start anew in another folder."
                )
            known = {entry.name for entry in fields(StageRecord)}
            cut = tree["cut"]
            if not all(isinstance(size, int) and size > 0 for size in cut) or len(cut) != len(tree["stages"]):
                raise ValueError("cut")
            records = [StageRecord(**{k: v for k, v in stage.items() if k in known}) for stage in tree.pop("stages")]
            return cls(stages=records, **tree)
        except FileNotFoundError:
            raise RunError(
                f"{path.parent} is not a run directory: it holds no run.json; name one, or start a run."
            ) from None
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path} is damaged; restore it, or move the folder away and start anew.") from None


def open_run(out: Path) -> tuple[RunStore, RunState]:
    """Paths and state of an existing run. Raises RunError."""
    if not out.is_dir():
        raise RunError(f"There is no run directory {out}; start one with: layerwise run --out {out}.")
    state = RunState.load(out / "run.json")
    return RunStore(out, Path(state.caches)), state

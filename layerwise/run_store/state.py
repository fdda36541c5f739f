"""What run.json says: how far a run is, stage by stage."""

import json
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from layerwise.errors import RunError
from layerwise.files import write_json

VERSION = 3

Status = Literal["pending", "training", "caching", "done"]


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

    @property
    def is_trained(self) -> bool:
        """Whether its weights are final, its outputs cached or not."""
        return self.status in ("caching", "done")


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

    @property
    def is_trained(self) -> bool:
        """Whether the weights of all stages are final."""
        return all(record.is_trained for record in self.stages)

    def record(self, stage: int) -> StageRecord:
        return self.stages[stage - 1]

    def reset_from(self, stage: int) -> None:
        """Sets this stage and those above it back to the beginning; whether they are to be cached stays decided."""
        for record in self.stages[stage - 1 :]:
            self.stages[record.stage - 1] = StageRecord(record.stage, cached=record.cached)

    def save(self, path: Path) -> None:
        """Replaces run.json atomically. Raises RunError."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "RunState":
        """Raises RunError where there is no readable run.json of this version."""
        try:
            tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
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

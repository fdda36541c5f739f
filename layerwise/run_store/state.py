"""The records of a run: run.json, which says how far each stage is and what its files were, and the smaller ones beside it."""

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from layerwise.config import Config
from layerwise.errors import RunError
from layerwise.records import STRICT, Count, Digest, Share, read_record, write_record

VERSION = 4

MOST_STAGES = 10_000

Status = Literal["pending", "training", "caching", "done"]
Number = Annotated[int, Field(ge=1, le=MOST_STAGES)]
"""Of a stage, from 1."""

RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


@dataclass(frozen=True, slots=True)
class EarlierTraining:
    """What a stage has learnt before more epochs were asked for: they go on from it."""

    __pydantic_config__ = STRICT

    epochs: Count
    checkpoint: Digest | None
    """What its checkpoint was saved for; None where that is gone."""
    weights: Digest | None
    """Of its trained weights, which it goes on from where the checkpoint is gone; None where it had not ended."""
    same_input: bool
    """Whether it reads what it has read before, so that its losses can be compared; else a stage below has learnt more."""


@dataclass(slots=True)
class StageRecord:
    """What run.json says of a stage; sizes in bytes."""

    __pydantic_config__ = STRICT

    stage: Number
    status: Status = "pending"
    epochs: Count = 0
    converged: bool | None = None
    best_loss: float | None = None
    peak_bytes: Count | None = None
    """The larger of the two peaks below."""
    train_peak_bytes: Count | None = None
    train_peak_by_kind: dict[str, Count] | None = None
    """What the training peak was made of: parameters, gradients, optimizer, activations."""
    cache_peak_bytes: Count | None = None
    allocator_bytes: Count | None = None
    """On CUDA: most that the allocator has held for the stage, in use or in reserve."""
    driver_bytes: Count | None = None
    """On CUDA: that and the context, which is what the driver has shown for the process at most."""
    micro_batch: Count | None = None
    input: Literal["data", "cache", "recompute"] | None = None
    """Where its samples come from: data, cache, or recompute where the stage below is not cached."""
    input_on_device: bool | None = None
    """On CUDA: whether all of that stayed on the device; None where that was not planned."""
    cached: bool | None = None
    """Whether its outputs are to be cached; None until the stage is begun."""
    cache: Annotated[str, Field(pattern=r"^stage-[1-9]\d*\.h5$")] | None = None
    """Name of its cache in the folder of the caches; None where there is none, or none any more."""
    cache_bytes: Count | None = None
    config: Config | None = None
    """The options that it is trained with; None until it is begun."""
    weights: Digest | None = None
    """Digest of its trained weights."""
    fingerprint: Digest | None = None
    """Names its cache: a digest of its input, its options and its weights."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    earlier: EarlierTraining | None = None
    """None where its training began with first weights."""

    @property
    def is_trained(self) -> bool:
        """Whether its weights are final, its outputs cached or not."""
        return self.status in ("caching", "done")

    @property
    def trained_with(self) -> Config:
        """Its options. Raises RunError where the stage is not begun."""
        if self.config is None:
            raise RunError(f"Stage {self.stage} is not begun; go on with the run first.")
        return self.config

    def as_json(self, cache: Path) -> dict[str, Any]:
        """What other programs are told of the stage. cache: where its cache would lie."""
        tree = TypeAdapter(StageRecord).dump_python(self, mode="json", exclude={"config", "earlier"})
        return tree | {"cache": str(cache) if cache.exists() else None}


@dataclass(slots=True)
class RunState:
    """run.json."""

    __pydantic_config__ = STRICT

    stages: Annotated[list[StageRecord], Field(min_length=1, max_length=MOST_STAGES)]
    config: Config
    """The options of the newest start."""
    data_identity: str
    budget_bytes: Count | None
    device: str
    caches: str
    """The folder of the caches, from the run's own folder."""
    inode: Count
    """Of the run's own folder at the newest start: tells a copy of the run from one that was moved."""
    cut: Annotated[list[Number], Field(min_length=1, max_length=MOST_STAGES)]
    """Layers in each stage."""
    network: str = ""
    """Identity of a network that is none of the paper's; empty where options say all about it."""
    structure: str = ""
    """Of that network, without its weights."""
    first_weights: Digest | None = None
    """Digest of the weights that it was begun with, in first_weights.safetensors; None where the seed says all about them."""
    takes: Annotated[str, Field(pattern="^(waveforms|pictures|arrays|)$")] = ""
    """What its data are, see `DataSet`; empty in a run of an earlier version."""
    optimization: str = ""
    """Identity of an optimizer that was given as an object."""
    classes: str = ""
    """Digest of the class of each sample, where a label is learnt."""
    from_stage: Number | None = None
    """The `--from-stage` that is being carried out; None where there is none or it is finished."""
    kept_stages: Count = 0
    """Stages 1 to this kept the training options of an earlier start when `--from-stage` retrained those above."""
    encoder: Digest | None = None
    """Digest of encoder.safetensors; None until it is written."""
    copy_of: RunId | None = None
    """The run that this one was copied from; caches that were copied along still bear its id."""
    run_id: RunId = field(default_factory=lambda: secrets.token_hex(8))
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

    def weights_of(self, stage: int) -> str | None:
        """Digest of the trained weights of a stage; None where there is no such stage, or it is not trained."""
        return self.record(stage).weights if stage <= len(self.stages) else None

    def reset_from(self, stage: int) -> None:
        """Sets this stage and those above it back to the beginning; whether they are to be cached stays decided."""
        for record in self.stages[stage - 1 :]:
            self.stages[record.stage - 1] = StageRecord(record.stage, cached=record.cached)

    def train_further(self, stage: int, earlier: EarlierTraining | None) -> None:
        """Sets a stage back so that it is trained again from where it stands."""
        before = self.record(stage)
        seconds = before.seconds if earlier else 0.0
        self.stages[stage - 1] = StageRecord(stage, cached=before.cached, earlier=earlier, seconds=seconds)

    def save(self, path: Path) -> None:
        """Replaces run.json atomically. Raises RunError."""
        write_record(path, self)

    @classmethod
    def load(cls, path: Path) -> "RunState":
        """Raises RunError where there is no readable run.json of this version."""
        if not path.exists():
            raise RunError(f"{path.parent} is not a run directory: it holds no run.json; name one, or start a run.")
        way_out = "restore it, or move the whole folder away and start anew."
        state = read_record(cls, path, VERSION, way_out)
        stages = [record.stage for record in state.stages]
        if stages != list(range(1, len(stages) + 1)) or len(state.cut) != len(stages):
            raise RunError(f"{path} is damaged: its stages do not fit its cut; {way_out}")
        return state


@dataclass(frozen=True, slots=True)
class Confusion:
    """Test rows of each class, by the class that was predicted."""

    __pydantic_config__ = STRICT

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    counts: list[list[Count]]
    """[true class][predicted class]"""

    def __post_init__(self) -> None:
        if [len(row) for row in self.counts] != [len(self.classes)] * len(self.classes):
            raise ValueError("counts is not a square of classes")


@dataclass(frozen=True, slots=True)
class StageError:
    """Error rates from 0 to 1; train and test count samples, or frames where the label is per frame."""

    __pydantic_config__ = STRICT

    stage: Number
    error: Share
    untrained_error: Share
    train: Count
    test: Count
    confusion: Confusion | None
    """Of the trained stage; None where there are too many classes."""
    weights: Digest
    """Digest of the weights that were probed."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The error, from 0 to 1, of the same classifier on features of the input that nobody has learnt."""

    __pydantic_config__ = STRICT

    name: str
    error: Share
    asked: Digest
    """Digest of what was to be told of which samples."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe of every finished stage, as probes/NAME.json holds it."""

    __pydantic_config__ = STRICT

    label: str
    stages: Annotated[list[StageError], Field(min_length=1)]
    peak_bytes: Count
    """Most that the probe held on the device."""
    classifier: str
    """linear or knn."""
    grid: Number = 1
    """Features of a sample are means over so many cells a side."""
    baseline: Baseline | None = None
    """None of data that are neither pictures nor recordings."""


@dataclass(frozen=True, slots=True)
class CacheOwner:
    """Whose caches lie in a folder."""

    __pydantic_config__ = STRICT

    run_id: RunId
    run: str
    """The folder of the run, from the folder of the caches."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """What was noted when the job of a run was queued again."""

    __pydantic_config__ = STRICT

    stands: list[Any]
    """Where the run stood."""
    in_vain: Count
    """Starts in a row that ended there."""

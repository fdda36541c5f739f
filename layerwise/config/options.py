"""Every option once: its name, default, unit, check and what it touches.

An option's scope says what follows when it changes between two starts of a run:
    shape     it shapes the data or the network of all stages; only a new run can change it
    training  it acts on the training of a stage; `--from-stage` may change it from that stage on
    place     where things lie and how they are run; it may change at any time
"""

import datetime
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from layerwise.units import seconds

RECORDINGS, PICTURES, ARRAYS = ("demo", "speech", "fsdd", "librispeech"), ("images", "stl10", "cifar10"), ("npy", "h5")
DATA_KINDS = (*RECORDINGS, *PICTURES, *ARRAYS)
"""What may stand before the colon of --data."""

PRESET_NETWORKS = ("speech", "vision", "convnet")

TORCHVISION, TIMM, HUGGING_FACE = "torchvision:", "timm:", "hf:"
LIBRARIES = (TORCHVISION, TIMM, HUGGING_FACE)
"""What stands before a network of a library: its name, or for hf: a folder or file with its configuration."""

FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""How a function of the user's is named: package.module:function."""

OWN = "own"
"""The name of data and networks that are given as objects, in Python."""

Scope = Literal["shape", "training", "place"]


def _option(default: Any, scope: Scope, flag: str | None = None, **checks: Any) -> Any:
    """flag: its own one on the command line, if any. What stands below an option is its help text."""
    return Field(default, json_schema_extra={"scope": scope, "flag": flag}, **checks)


NONE = "none"
"""The value of a number that is not given."""


def _may_be_none(section: type[BaseModel], name: str) -> bool:
    field = section.model_fields.get(name)
    return field is not None and field.default is None and str not in get_args(field.annotation)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _paths(cls, given: Any) -> Any:
        """As strings, which is how the options of a run are kept."""
        if not isinstance(given, dict):
            return given
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}

    @model_validator(mode="before")
    @classmethod
    def _nothing(cls, given: Any) -> Any:
        """NONE takes away what a recipe says: TOML has no word for it."""
        if not isinstance(given, dict):
            return given
        return given | {name: None for name, value in given.items() if value == NONE and _may_be_none(cls, name)}


class DataOptions(Section):
    """Where samples come from and how they are cut into frames."""

    source: str = _option("demo", "place", "--data")
    """demo, KIND:PATH (speech, fsdd, librispeech, images, stl10, cifar10, npy, h5), or package.module:function"""
    labels: str = _option("", "place", "--labels")
    """CSV file of labels: a column id or path names the sample, every other column is a label; default: those of the data"""
    frames: Literal["steps", "patches", "whole"] = _option("steps", "shape", "--frames")
    """what a frame is: steps of a recording, a stream or an array; patches of a picture; or whole samples; default: what
    --net reads, steps for recordings, whole samples for a network of your own"""
    frame_length: int = _option(1, "shape", ge=1, le=2**20)
    """steps: steps in a frame"""
    frame_step: int | None = _option(None, "shape", ge=1, le=2**20)
    """steps: from one frame to the next, steps; default: data.frame_length"""
    sample_rate: int = _option(16_000, "shape", ge=1, le=10**7)
    """speech: rate that recordings are resampled to, Hz"""
    window: int = _option(20_480, "shape", ge=1, le=2**30)
    """steps: length of a training window, frames (of speech: samples)"""
    pattern: str = _option("", "shape")
    """speech: regular expression on the path whose named groups become labels; empty: speaker = folder"""
    picture: int = _option(96, "shape", ge=1, le=2**14)
    """images: side that pictures are resized and centre-cropped to, pixels"""
    crop: int = _option(64, "shape", ge=1, le=2**14)
    """images: side of the random crop, pixels"""
    patch: int = _option(16, "shape", ge=1, le=2**14)
    """images: side of a patch, pixels"""
    patch_stride: int = _option(8, "shape", ge=1, le=2**14)
    """images: distance between patches, pixels"""
    gray: bool = _option(True, "shape")
    """images: convert to one grey channel"""
    flip: bool = _option(True, "shape")
    """images: train on mirrored pictures too (a second view in the cache)"""
    views: int | None = _option(None, "shape", "--views", ge=1)
    """renderings of each sample that are cached side by side; default: what the data have, 2 for patches with flip"""
    held_out: float = _option(0.1, "shape", gt=0, lt=1)
    """part of the training samples kept for the held-out loss"""
    test: float = _option(0.2, "shape", gt=0, lt=1)
    """part of the samples kept for probes, where there is no customary test split"""


class NetOptions(Section):
    """The network. Defaults: the speech network of Löwe et al. 2019, appendix A.2."""

    name: str = _option(
        "speech", "shape", "--net", pattern=f"^(speech|vision|convnet|own|{FUNCTION}|timm:[\\w.]+|hf:.+)$"
    )
    """network: speech, vision, convnet, torchvision:NAME or timm:NAME (without its classifier), hf:PATH (a folder or
    config.json), or package.module:function"""
    weights: str = _option("", "place", "--weights")
    """torchvision, timm: .safetensors file of weights to start from; default: random ones"""
    at: tuple[str, ...] = _option((), "shape", "--at")
    """modules that begin a stage, such as layer2,layer3.0; default: cut everywhere that it can be, for a library's network but
    before normalisations, or as --stages says"""
    width: int = _option(512, "shape", ge=1, le=2**24)
    """channels of the speech layers; of the first vision module before its expansion by 4; that each convolution of convnet
    adds"""
    kernels: tuple[int, ...] = _option((10, 8, 4, 4, 4), "shape", max_length=1000)
    """speech: kernel of each convolution, frames"""
    strides: tuple[int, ...] = _option((5, 4, 2, 2, 2), "shape")
    """speech: stride of each convolution, frames"""
    paddings: tuple[int, ...] = _option((2, 2, 2, 2, 1), "shape")
    """speech: zero padding of each convolution, frames"""
    centred: bool = _option(False, "shape")
    """speech: whether the filters of each convolution are centred over its channels, and its inputs, where they have several
    channels, standardised by what the recordings hold, so that no channel stays silent; the paper has neither"""
    dense: bool = _option(False, "shape")
    """speech: whether the channels of each layer lie beside those that it reads, averaged over the same frames (DenseNet), so
    that a stage adds to what those below have found; needs net.centred; the paper has not"""
    context: int = _option(256, "shape", ge=0, le=2**24)
    """speech: width of the recurrent layer; 0: none"""
    mirrored: bool = _option(False, "shape")
    """convnet: whether a picture and its mirror image are to give the same, as the mean of what both give: for pictures whose
    mirror image shows the same thing"""
    blocks: tuple[int, ...] = _option((3, 4, 6), "shape")
    """vision, convnet: residual blocks, or convolutions, of each module"""
    stem_stride: int = _option(1, "shape", ge=1)
    """vision: stride of the 5x5 stem inside a patch"""

    @field_validator("at", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_geometry_per_convolution(self) -> "NetOptions":
        if not (len(self.kernels) == len(self.strides) == len(self.paddings)):
            raise ValueError("kernels, strides and paddings need one entry per convolution")
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError("blocks needs at least one module of at least one block")
        if min((*self.kernels, *self.strides), default=1) < 1 or min(self.paddings, default=0) < 0:
            raise ValueError("kernels and strides must be at least 1, paddings at least 0")
        if sum(self.blocks) > 10_000:
            raise ValueError("blocks must be 10000 or fewer in all")
        if any(padding > kernel for kernel, padding in zip(self.kernels, self.paddings, strict=True)):
            raise ValueError("a padding larger than its kernel would give frames of nothing")
        if self.name == "convnet" and self.width < 4:
            raise ValueError("width must be at least 4 for convnet: its filters are centred over half as many")
        if self.centred and self.width < 2:
            raise ValueError("width must be at least 2 where filters are centred over the channels")
        if self.dense and not self.centred:
            raise ValueError("dense needs centred: give net.dense=false, or net.centred=true")
        if not self.kernels and not self.context:
            raise ValueError("a speech network needs at least one layer: give kernels, or a context")
        if any(stride > kernel for kernel, stride in zip(self.kernels, self.strides, strict=True)):
            raise ValueError("a stride larger than its kernel would skip frames")
        return self


class ObjectiveOptions(Section):
    """What each stage is trained for. Defaults: speech, Löwe et al. 2019, appendix A.2."""

    name: str = _option("infonce", "training", "--objective")
    """local objective of each stage: infonce, hinge, ntxent, infonce+ntxent or supervised"""
    cells: int = _option(1, "training", ge=1, le=1000)
    """whole samples: cells on a side of a stage's output, whose averages infonce, hinge and infonce+ntxent predict from one
    another; ntxent compares them side by side; 1: one average of it all, as supervised has it"""
    label: str = _option("", "training", "--label")
    """supervised: the label that is learnt"""
    steps: int = _option(12, "training", ge=1, le=10**4)
    """rows ahead that are predicted"""
    skip: int = _option(0, "training", ge=0, le=10**6)
    """rows left out between context and first target"""
    gap: int = _option(0, "training", ge=0, le=10**9)
    """recordings and arrays: steps of the data left out between context and first target, by as many rows as a stage makes of
    them, so that no stage predicts what the nearest samples tell; or `skip` where that is more"""
    negatives: int = _option(10, "training", ge=1, le=10**6)
    """negatives of each target, drawn from the whole batch"""
    anchors: int = _option(128, "training", ge=2, le=10**7)
    """rows of a window that serve as contexts and targets"""
    temperature: float = _option(0.5, "training", gt=0)
    """ntxent, infonce+ntxent: what similarities are divided by"""
    projection: int | None = _option(None, "training", ge=0, le=10**6)
    """most channels of what is compared: targets and contexts with more go through one matrix first; 0: no such matrix, as
    in the paper; default: 0, and 128 for the projection of ntxent, which always has one"""

    @model_validator(mode="after")
    def _what_is_compared(self) -> "ObjectiveOptions":
        if self.name in ("ntxent", "infonce+ntxent") and self.projection == 0:
            raise ValueError("projection 0: ntxent always projects what it compares; give the width, such as 128")
        if self.skip + 2 > self.anchors:
            raise ValueError(
                f"skip {self.skip} leaves no target among anchors {self.anchors}; give a lower skip, or more anchors"
            )
        return self

    @property
    def chance_loss(self) -> float | None:
        """The loss of a guess, with all scores 0; None for an objective of which it is not known here."""
        return {"infonce": math.log(1 + self.negatives), "hinge": 2.0}.get(self.name)

    def is_at_chance(self, loss: float) -> bool:
        """Whether a loss is not clearly below that of a guess; False where that is not known."""
        return self.chance_loss is not None and loss > CLEARLY_BELOW * self.chance_loss


CLEARLY_BELOW = 0.995
"""Part of the loss of a guess."""


class TrainingOptions(Section):
    """The stage loop."""

    stages: Annotated[int, Field(ge=1, le=10**4)] | Literal["fewest"] | None = _option(None, "shape", "--stages")
    """number of stages, 1 for end to end, or fewest: the fewest that --gpu-mem holds; default: the network's own, those of
    them that --gpu-mem does not hold cut further"""
    schedule: Literal["sequential", "simultaneous"] = _option("sequential", "shape")
    """sequential: one module after another, each from the cache of the one below; simultaneous: all of them at once,
    gradients isolated, all on the device (to compare with)"""
    max_epochs: int = _option(100, "training", "--max-epochs", ge=1, le=10**9)
    """most epochs that a stage is trained"""
    rounds: int = _option(1, "shape", "--rounds", ge=1, le=10**4)
    """parts of the epochs of each stage; after each the next stage goes on from what it has put out, so that stages can
    train at the same time (see --devices)"""
    patience: int = _option(3, "training", "--patience", ge=1, le=10**9)
    """epochs without improvement before a stage has converged; those at chance, before it has learnt anything, do not count"""
    min_delta: float = _option(1e-3, "training", ge=0)
    """smallest relative improvement of the held-out loss that counts"""
    batch_size: int = _option(8, "training", "--batch-size", ge=1, le=10**6)
    """windows in a batch"""
    lr: float = _option(2e-4, "training", "--lr", gt=0)
    """learning rate of Adam"""
    warmup_steps: int = _option(0, "training", ge=0, le=10**9)
    """first steps of a stage, over which Adam's learning rate rises to training.lr"""
    cosine: bool = _option(False, "training")
    """let Adam's learning rate fall to 0 over --max-epochs, as half a cosine does"""
    weight_decay: float = _option(0.0, "training", ge=0)
    """part of the weights, times the learning rate, that Adam takes off in each step"""
    adam_eps: float = _option(1e-6, "training", gt=0)
    """Adam's epsilon; at 1e-8 rounding moves the weights of channels that hardly learn"""
    input_noise: float = _option(0.0, "training", ge=0)
    """noise on the inputs of stages above the first, as a part of their level (root mean square)"""
    frame_dropout: float = _option(0.0, "training", ge=0, lt=1)
    """part of the input frames of stages above the first that is dropped in each step"""
    precision: Literal["float32", "bfloat16", "float16"] = _option("float32", "training", "--precision")
    """float32, or autocast to bfloat16 or float16; recurrent layers compute in float32 under bfloat16"""
    deterministic: bool = _option(False, "place", "--deterministic")
    """on a GPU: only operations that give the same bits every time, and float32 without TF32; slower"""
    seed: int = _option(0, "shape", "--seed", ge=0, le=2**63 - 1)
    """seed of weights, splits, windows and negatives"""
    warm_start: str | None = _option(None, "place", "--warm-start")
    """a new run begins with the weights of this finished run, or exported folder, of the same network: for more data; default:
    with random ones, or those that your network has"""
    device: str = _option("auto", "place", "--device", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda or cuda:N"""
    checkpoint_seconds: float = _option(60, "place", ge=0, le=10**9)
    """time between checkpoints inside an epoch, seconds"""
    probe_every: int = _option(0, "place", "--probe-every", ge=0, le=10**9)
    """after every so many epochs, show how well the stage tells a label of training samples that are kept apart for it:
    --label, or the data's first; 0: never"""
    log: Literal["none", "tensorboard", "wandb", "mlflow"] = _option("none", "place", "--log")
    """show curves in tensorboard, wandb or mlflow too; none: in metrics.jsonl alone"""

    @model_validator(mode="after")
    def _what_the_schedule_and_the_epochs_allow(self) -> "TrainingOptions":
        if self.schedule == "simultaneous" and (self.input_noise or self.frame_dropout):
            raise ValueError(
                "input_noise and frame_dropout are for inputs that never change; with schedule simultaneous they do, so "
                "leave them out"
            )
        if self.rounds > self.max_epochs:
            raise ValueError(
                f"--rounds {self.rounds} share out --max-epochs {self.max_epochs}: give at least one epoch to each round"
            )
        if self.rounds > 1 and self.schedule == "simultaneous":
            raise ValueError(f"--rounds {self.rounds}: with schedule simultaneous there is one; leave them out")
        return self


_SIZE = TypeAdapter[ByteSize | None](ByteSize | None)


def _size(value: Any) -> Any:
    """A budget in bytes, from text with a unit. Raises ValueError."""
    if isinstance(value, str) and value.strip().isdigit() and int(value):
        raise ValueError(f"{value} has no unit; write it like 4GB, 3.5GiB or 800MB")
    try:
        size = _SIZE.validate_python(value)
    except ValidationError:
        raise ValueError(f"{value!r} is not a size; write it like 4GB, 3.5GiB or 800MB") from None
    if size is not None and size <= 0:
        raise ValueError(f"a budget of {value} holds nothing; write it like 4GB, 3.5GiB or 800MB")
    return size


Budget = Annotated[ByteSize | None, BeforeValidator(_size)]


class MemoryOptions(Section):
    """The device budget."""

    gpu_mem: Budget = _option(None, "place", "--gpu-mem")
    """most device memory of the run, such as 4GB; default: no limit"""
    micro_batch: int | None = _option(None, "place", ge=1, le=10**6)
    """samples that are on the device at once; default: as many as the budget holds"""
    recompute: Literal["auto", "always", "never"] = _option("auto", "place")
    """keep only the inputs of layers and run these again in the backward pass; auto: where it helps"""
    optimizer: Literal["auto", "device", "host"] = _option("auto", "place")
    """where the optimizer's state lies; auto: on the host where the budget needs it"""
    flops_per_byte: int | None = _option(None, "place", ge=1, le=10**9)
    """operations that the device does while a byte is moved to it, which decide between plans; default: measured once"""


class CacheOptions(Section):
    """The activation caches."""

    dir: str = _option("cache", "place", "--cache-dir")
    """folder of the activation caches"""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = _option("float16", "training", "--cache-dtype")
    """dtype of cached activations; int8: with a scale per channel"""
    scratch: str | None = _option(None, "place")
    """folder on a fast disk of this machine, such as $TMPDIR, in which a cache is written before it is copied to its place"""
    compression: Literal["none", "zstd"] = _option("none", "place", "--cache-compression")
    """zstd: pack each cache once it is whole; less room, slower reads"""
    block: ByteSize = _option("32MiB", "place", ge=512, le=2**32)
    """bytes that are written and synced at once; a kill costs no more"""
    disk: Budget = _option(None, "place", "--disk")
    """most disk that the caches may take, such as 200GB; default: what is free"""
    keep: Literal["needed", "all", "last"] = _option("needed", "place", "--keep")
    """which caches stay: needed: the newest, and the one that it could be made again from; all; last: the newest"""
    policy: Literal["auto", "always", "never"] = _option("auto", "place", "--cache")
    """cache the outputs of a stage, or recompute them for the next one; auto: where they fit"""


class EngineOptions(Section):
    """Who performs the tasks of a run."""

    name: Literal["local", "dask", "slurm"] = _option("local", "place", "--engine")
    """local: this machine; dask: the workers of a Dask cluster; slurm: a batch job for each task"""
    devices: tuple[str, ...] = _option((), "place", "--devices")
    """a worker process for each of these devices: 0,1,2 or cpu,cpu; default: this process"""
    scheduler: str | None = _option(None, "place", "--scheduler")
    """dask: address of the scheduler; default: a cluster on this machine"""
    partition: str | None = _option(None, "place", "--partition")
    """slurm: partition of the jobs; default: the cluster's"""
    gpus: int = _option(1, "place", ge=0, le=10**4)
    """slurm: GPUs of a job, where the device is not cpu"""
    sbatch: tuple[str, ...] = _option((), "place")
    """slurm: more options of sbatch, such as ['--account=physics']"""
    time: str | None = _option(None, "place", "--time")
    """stop by oneself, resumable, a little before so much time is over, such as 2h or 1:30:00; of a Slurm job: its limit;
    default: none"""

    @field_validator("devices", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        if isinstance(value, int):
            value = str(value)
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        devices = [f"cuda:{name}" if str(name).isdigit() else name for name in names]
        wrong = [name for name in devices if not re.fullmatch(r"cpu|cuda:\d+", str(name))]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no device; write --devices 0,1,2 for GPUs, or cpu,cpu")
        return devices

    @field_validator("time", mode="before")
    @classmethod
    def _a_time(cls, value: Any) -> Any:
        # Unquoted in TOML, 01:30:00 is a time of day.
        written = str(value) if isinstance(value, datetime.time) else value
        if written is not None:
            if not isinstance(written, str) or written.strip().isdigit():
                raise ValueError(f"{written} has no unit; write it like 2h, 90min, 3600s, 1:30:00 or 1-12:00:00")
            seconds(written)
        return written


class Config(Section):
    """All options of one run, resolved."""

    out: str = _option("", "place", "--out")
    """run directory; default: runs/RECIPE"""
    data: DataOptions = DataOptions()
    net: NetOptions = NetOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    training: TrainingOptions = TrainingOptions()
    memory: MemoryOptions = MemoryOptions()
    cache: CacheOptions = CacheOptions()
    engine: EngineOptions = EngineOptions()

    @property
    def alike(self) -> tuple[object, ...]:
        """Runs in which this is equal take the same on the device, stage by like stage: however long they train, from whatever
        seed and under whatever budget."""
        settings = [*vars(self.training).items(), *vars(self.memory).items()]
        apart = {
            "stages",
            "max_epochs",
            "rounds",
            "patience",
            "warmup_steps",
            "cosine",
            "weight_decay",
            "seed",
            "device",
            "checkpoint_seconds",
            "probe_every",
            "log",
            "warm_start",
            "deterministic",
        }
        apart |= {"gpu_mem", "flops_per_byte"}
        return self.objective, self.cache.dtype, *[value for name, value in settings if name not in apart]

    def to_toml(self) -> str:
        """The resolved configuration as TOML. Numbers without a value are NONE, since a recipe may say one; texts without
        one are left out."""
        tree = self.model_dump(mode="json", exclude_none=True)
        for section, own in self:
            if isinstance(own, Section):
                without = {name for name, value in own if value is None and _may_be_none(type(own), name)}
                tree[section] |= dict.fromkeys(sorted(without), NONE)
        return tomli_w.dumps(tree)


@dataclass(frozen=True, slots=True)
class Option:
    """One option as the command line and the documentation see it."""

    key: str
    """Dotted name, for example training.lr."""
    flag: str | None
    """Its own command line flag, or None where only `--set key=value` reaches it."""
    scope: Scope
    help: str
    default: Any
    kind: str
    """What it takes, in a word: NUMBER, SIZE, or the words that it may be."""


def options() -> Iterator[Option]:
    """Every option, in the order of the file."""
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for inner, inner_field in field.annotation.model_fields.items():
                yield _as_option(f"{name}.{inner}", inner_field)
        else:
            yield _as_option(name, field)


def _as_option(key: str, field: Any) -> Option:
    extra = field.json_schema_extra
    help = (field.description or "").replace("\n", " ")
    return Option(key, extra["flag"], extra["scope"], help, field.default, _kind(field.annotation))


_KINDS = {int: "NUMBER", float: "NUMBER", bool: "true|false", ByteSize: "SIZE"}


def _kind(annotation: Any) -> str:
    """Of several types, each once."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(dict.fromkeys(_kind(each) for each in get_args(annotation) if each is not NoneType))
    return "LIST" if get_origin(annotation) is tuple else _KINDS.get(annotation, "TEXT")


def section_titles() -> dict[str, str]:
    """What each section of options is about, by its name, in the order of the file."""
    return {
        name: (field.annotation.__doc__ or "").partition(".")[0]
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def changed_options(old: Config, new: Config, scopes: set[Scope]) -> list[tuple[Option, Any, Any]]:
    """Options of the given scopes whose values differ: (option, old value, new value)."""
    return [
        (option, value_of(old, option.key), value_of(new, option.key))
        for option in options()
        if option.scope in scopes and value_of(old, option.key) != value_of(new, option.key)
    ]


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return attrgetter(key)(config)

"""What all tests share: real data where it is present, tiny recordings and configurations where it is not needed."""

import gc
import os
import shutil
import signal
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import settings

from layerwise.config import Config, resolve
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.data.synthesis import synthesise_corpus
from layerwise.engines.run import RunResult, run
from layerwise.evaluate.probe import probe
from layerwise.nets import shortest_sample
from layerwise.nets.network import Network
from layerwise.stop import StopFlag
from layerwise.training.budget import fit_to_budget
from layerwise.training.cache_plan import CachePlan
from layerwise.training.cut import cut_network
from layerwise.training.spec import StageSpec

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Two test processes share two cores; more threads than cores would only fight.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Temporary folders lie in memory where it has room: runs sync their files at every step, which takes a disk long.

    Signals that are ignored where the suite runs in the background are not: programs that it starts are told of them.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    # The same examples at every run, so that a commit passes or does not; HYPOTHESIS_PROFILE=default looks for new ones.
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at it again, in processes that tests fork either."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def fsdd() -> Path:
    """The Free Spoken Digits recordings."""
    folder = SHARED_DATA / "fsdd"
    if not folder.is_dir():
        pytest.skip(f"the Free Spoken Digit Dataset is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """CIFAR-10 pictures in class folders."""
    folder = SHARED_DATA / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"the CIFAR-10 pictures are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty-eight recordings named as in Free Spoken Digits: digits 0 to 3, six speakers, indices 0 (test) and 5.

    Real ones where they are present, noisy tones of the same lengths elsewhere: no promise goes untested for want of data.
    """
    folder = tmp_path_factory.mktemp("digits")
    real = SHARED_DATA / "fsdd" / "recordings"
    for digit in range(4):
        for speaker in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"):
            for index in (0, 5):
                name = f"{digit}_{speaker}_{index}.wav"
                if real.is_dir():
                    (folder / name).symlink_to(real / name)
                else:
                    rng = np.random.default_rng(zlib.crc32(name.encode()))
                    times = np.arange(rng.integers(2000, 5000)) / 8000
                    tone = 0.3 * np.sin(2 * np.pi * (200 * (digit + 1) + 10 * len(speaker)) * times)
                    soundfile.write(folder / name, tone + 0.01 * rng.standard_normal(len(times)), 8000)
    return folder


@pytest.fixture(scope="session")
def few_digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve of them: two digits of three speakers, each said twice."""
    folder = tmp_path_factory.mktemp("few-digits")
    for path in digits.iterdir():
        if path.name[0] in "01" and path.name.split("_")[1] in ("george", "jackson", "lucas"):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="session")
def plan_ahead() -> Callable[[Config], None]:
    """plan_ahead(config) plans that run in this process, so that no fork of it need work out what its stages take."""

    def plan(config: Config) -> None:
        device = torch.device("cpu")
        stages = cut_network(config, open_data(config.data, shortest_sample(config)), device)
        fit_to_budget(config, stages, CachePlan((True,) * len(stages)), device, set(), StopFlag())

    return plan


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo corpus has four short utterances of each of three speakers: the whole of it takes nine seconds to make."""
    monkeypatch.setattr("layerwise.data.open.synthesise_corpus", partial(synthesise_corpus, 3, 4, 0.5))


@pytest.fixture
def half_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's ResNet-18 has half its blocks, here and in forks of this process."""
    resnet = pytest.importorskip("torchvision.models.resnet")  # takes a second, which only these tests need
    build = resnet._resnet
    monkeypatch.setattr(resnet, "_resnet", lambda block, _, *rest, **named: build(block, [1, 1, 1, 1], *rest, **named))


@pytest.fixture
def write_tone(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recording of noise around a tone: write_tone(name, seconds, rate=8000, channels=1)."""

    def write(name: str, seconds: float = 0.2, rate: int = 8000, channels: int = 1) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        count = round(seconds * rate)
        rng = np.random.default_rng(len(name))
        tone = 0.3 * np.sin(np.arange(count) * (0.05 + 0.01 * len(name)))[:, None]
        soundfile.write(path, tone + 0.05 * rng.standard_normal((count, channels)), rate)
        return path

    return write


TINY_SPEECH = {
    "net.width": 8,
    "net.centred": False,
    "net.dense": False,
    "objective.projection": "none",
    "objective.gap": 0,
    "net.context": 8,
    "net.kernels": [10, 8, 8],
    "net.strides": [5, 4, 4],
    "net.paddings": [2, 2, 2],
    "data.sample_rate": 8000,
    "data.window": 1600,
    "objective.steps": 3,
    "objective.negatives": 4,
    "objective.anchors": 16,
    "training.batch_size": 4,
    "training.max_epochs": 2,
    "training.lr": 1e-3,
    "cache.block": "4kB",
    "cache.keep": "all",
}
"""A speech network of three convolutions and a recurrent layer that trains in a second, one stage each."""

CONVOLUTIONS = {
    "net.context": 0,
    "net.kernels": [10, 8, 4, 4],
    "net.strides": [5, 4, 2, 2],
    "net.paddings": [2, 2, 1, 1],
}
"""Four of them in its place train in half the time, which shows in many runs."""

TINY_VISION = {
    "net.name": "vision",
    "net.width": 4,
    "net.blocks": [1, 2, 1],
    "net.stem_stride": 2,
    "data.picture": 32,
    "data.crop": 24,
    "data.patch": 8,
    "data.patch_stride": 4,
    "data.gray": False,
    "objective.steps": 2,
    "objective.skip": 1,
    "objective.negatives": 4,
    "training.batch_size": 8,
    "training.max_epochs": 2,
    "cache.block": "4kB",
    "cache.keep": "all",
}
"""A vision network of three stages (four layers) that trains in seconds."""


@pytest.fixture(scope="session")
def tiny_options() -> dict[str, dict[str, object]]:
    """They by the kind of data, for runs that several tests share; without a recurrent layer: convolutions."""
    return {"speech": TINY_SPEECH, "convolutions": TINY_SPEECH | CONVOLUTIONS, "vision": TINY_VISION}


@pytest.fixture
def tiny_speech(tmp_path: Path) -> Callable[..., Config]:
    """tiny_speech(source, **{"dotted.key": value}): a configuration whose run lies in the test's own folder."""
    return lambda source, **changes: _tiny(TINY_SPEECH | CONVOLUTIONS, tmp_path, source, changes)


@pytest.fixture
def tiny_vision(tmp_path: Path) -> Callable[..., Config]:
    """The same for pictures."""
    return lambda source, **changes: _tiny(TINY_VISION, tmp_path, source, changes)


def _tiny(base: dict[str, object], folder: Path, source: str, changes: dict[str, object]) -> Config:
    places = {"data.source": source, "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
    return resolve(overrides={**base, **places, **changes})


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], RunResult]:
    """finished(config): that run, which a test may go on with or spoil; trained once a session and copied to its place."""
    trained: dict[str, Config] = {}

    def finish(config: Config) -> RunResult:
        key = _in(Path(), config).to_toml()
        if key not in trained:
            trained[key] = _in(tmp_path_factory.mktemp("finished"), config)
            run(trained[key])
        (out, caches), (new_out, new_caches) = _places(trained[key]), _places(config)
        shutil.copytree(out, new_out)
        shutil.copytree(caches, new_caches)
        return run(config)

    return finish


def _in(folder: Path, config: Config) -> Config:
    """The same run in another folder."""
    cache = config.cache.model_copy(update={"dir": str(folder / "cache")})
    return config.model_copy(update={"out": str(folder / "run"), "cache": cache})


def _places(config: Config) -> tuple[Path, Path]:
    """The folders of the run and of its caches."""
    return Path(config.out), Path(config.cache.dir).resolve() / Path(config.out).name


@pytest.fixture(scope="session")
def small_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of four stages, probed for digits and speakers; to be read, not changed."""
    folder = tmp_path_factory.mktemp("small")
    budgets = {"memory.gpu_mem": "5MB", "cache.disk": "20MB", "training.stages": 4}
    out = run(_tiny(TINY_SPEECH | CONVOLUTIONS, folder, f"fsdd:{digits}", budgets)).paths.out
    for label in ("digit", "speaker"):
        probe(out, label)
    return out


@dataclass(frozen=True)
class Noise:
    """A data set of noise, without files: what plans are made from."""

    lengths: np.ndarray
    """int64 [N]"""
    frame_shape: tuple[int, ...] = (1,)
    columns: int = 1
    views: int = 1
    identity: str = "noise"
    test: np.ndarray | None = None
    skipped: tuple[()] = ()
    frame_label_names: tuple[()] = ()
    labels: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        return [str(number) for number in range(len(self.lengths))]

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sample)
        return torch.randn(int(self.lengths[sample]), *self.frame_shape, generator=generator)[start:stop]


PlannedStages = Callable[..., tuple[Config, list[StageSpec]]]


@pytest.fixture(scope="session")
def planned_stages() -> PlannedStages:
    """planned_stages("speech" or "vision", network=None, **{"dotted.key": value}): a tiny configuration and its stages.

    The data are noise, four windows long each, so nothing is read and every batch is full.
    """

    def plan(kind: str, network: Network | None = None, **changes: object) -> tuple[Config, list[StageSpec]]:
        config = resolve(overrides={**{"speech": TINY_SPEECH, "vision": TINY_VISION}[kind], **changes})
        return config, cut_network(config, noise_for(config), torch.device("cpu"), network)

    return plan


@pytest.fixture(scope="session")
def noise_data() -> Callable[[Config], DataSet]:
    """noise_data(config): noise of the shape that the configuration's data have."""
    return noise_for


def noise_for(config: Config) -> Noise:
    """Samples of four windows, or whole pictures."""
    data = config.data
    if config.net.name == "speech":
        return Noise(np.full(24, 4 * data.window))
    side = (data.picture - data.patch) // data.patch_stride + 1
    return Noise(np.full(24, side * side), (1 if data.gray else 3, data.patch, data.patch), columns=side)

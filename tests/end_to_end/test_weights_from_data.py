"""Whole runs of the network that takes its first weights from the pictures."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import layerwise
from layerwise.config import Config, resolve
from layerwise.engines.run import run
from layerwise.errors import CacheError, ConfigError, Interrupted
from layerwise.evaluate.compare import compare
from layerwise.evaluate.probe import probe
from layerwise.evaluate.results import EQUALLY_LONG, GREEDY, UNTRAINED
from layerwise.events import Event, StageDone, StepDone
from layerwise.nets import _preset
from layerwise.nets.convnet import AT_ONCE, Stem
from layerwise.run_store import RunState
from layerwise.stop import StopFlag
from layerwise.training.first_weights import _in_equal_pieces


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """config(name, **options): a run of that name on 60 pictures of noise and stripes."""
    rng = np.random.default_rng(0)
    pictures = rng.standard_normal((60, 3, 16, 16), dtype=np.float32)
    pictures[::2] += 2 * np.sin(np.arange(16, dtype=np.float32))
    np.save(tmp_path / "pictures.npy", pictures)
    (tmp_path / "labels.csv").write_text("id,kind\n" + "".join(f"{i},{i % 2}\n" for i in range(60)))
    options = {
        "net.name": "convnet",
        "net.width": 8,
        "net.blocks": [1, 1],
        "data.source": f"npy:{tmp_path / 'pictures.npy'}",
        "data.labels": str(tmp_path / "labels.csv"),
        "data.frames": "whole",
        "data.views": 2,
        "objective.name": "ntxent",
        "objective.cells": 2,
        "training.batch_size": 8,
        "training.max_epochs": 2,
        "training.cosine": True,
    }

    def made(name: str, **more: object) -> Config:
        places = {"out": str(tmp_path / name), "cache.dir": str(tmp_path / "cache")}
        return resolve(overrides={**options, **places, **more})

    return made


def weights(config: Config) -> dict[str, np.ndarray]:
    return load_file(Path(config.out) / "encoder.safetensors")


@pytest.mark.parametrize("schedule", ["sequential", "simultaneous"])
def test_a_run_that_is_stopped_ends_with_the_same_bits(config: Callable[..., Config], schedule: str) -> None:
    whole, stopped = (config(name, **{"training.schedule": schedule}) for name in ("whole", "stopped"))
    run(whole)
    for after in (1, 9):
        flag, seen = StopFlag(), 0

        def notify(event: Event, flag: StopFlag = flag, after: int = after) -> None:
            nonlocal seen
            seen += isinstance(event, StepDone)
            if seen == after:
                flag.reason = "the test"

        with pytest.raises(Interrupted):
            run(stopped, stop=flag, notify=notify)
    run(stopped)
    ours, theirs = weights(stopped), weights(whole)
    assert {name: value.tobytes() for name, value in ours.items()} == {
        name: value.tobytes() for name, value in theirs.items()
    }


def test_a_stage_of_another_network_is_not_trained_upon(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a version with other filters has left."""
    with monkeypatch.context() as earlier:
        earlier.setattr(sys.modules[Stem.__module__], "MOST_FILTERS", 2)
        _preset.cache_clear()
        flag = StopFlag()

        def notify(event: Event) -> None:
            flag.reason = "the test" if isinstance(event, StageDone) else flag.reason

        with pytest.raises(Interrupted):
            run(config("run"), stop=flag, notify=notify)
    _preset.cache_clear()
    with pytest.raises(CacheError, match=r"gives 10 x 3 x 3 and stage 2 reads 12 x 3 x 3: .* --overwrite"):
        run(config("run"))
    run(config("run"), overwrite=True)


def test_what_comes_from_the_data_is_no_part_of_the_network_with_random_weights(
    config: Callable[..., Config],
) -> None:
    run(config("run"))
    first, *_ = probe(config("run").out, "kind").stages
    assert first.error < first.untrained_error or first.error == 0
    lowest = {
        name.split(".")[-1]: value for name, value in weights(config("run")).items() if name.startswith("layers.0.")
    }
    assert np.abs(lowest["shift"]).max() > 0
    assert np.abs(lowest["deviation"] - 1).max() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective.name": "infonce", "objective.cells": 4}, "all see a part of it in common"),
        ({"objective.name": "infonce", "objective.cells": 2, "objective.skip": 3}, "give --objective ntxent"),
        ({"objective.name": "infonce", "objective.cells": 1}, "objective.cells=4 to compare cells"),
        ({"objective.name": "infonce+ntxent"}, "predicts nothing: .* no stage has two cells"),
        ({"objective.name": "infonce+ntxent", "objective.projection": 0}, "always projects"),
    ],
)
def test_what_has_nothing_to_compare_is_refused(
    config: Callable[..., Config], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config("run", **options))


def test_data_that_are_no_pictures_are_refused(config: Callable[..., Config], tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.ones((60, 20), dtype=np.float32))
    with pytest.raises(ConfigError, match="whole pictures of 10 x 10 pixels or more"):
        run(config("run", **{"data.source": f"npy:{tmp_path / 'vectors.npy'}", "data.labels": ""}))


def test_after_a_cosine_more_epochs_are_trained_anew_alone(config: Callable[..., Config]) -> None:
    run(config("run", **{"training.max_epochs": 1}))
    with pytest.raises(ConfigError, match="from-stage"):
        run(config("run"))


def test_all_methods_are_compared_on_whole_pictures_with_the_objective_of_the_run(
    config: Callable[..., Config],
) -> None:
    begun = config("compared", **{"training.patience": 1, "training.lr": 0.05})
    methods = [GREEDY, "cpc", "supervised", "cpc-converged", "supervised-converged", UNTRAINED]
    found = compare(begun, "kind", seeds=[0], methods=methods)
    assert [method.method for method in found.methods] == methods
    states = {path.parts[-3]: RunState.load(path) for path in Path(begun.out).glob("runs/*/seed-0/run.json")}
    for method, state in states.items():
        assert state.config.objective.name == ("supervised" if "supervised" in method else "ntxent")
        (epochs,) = {record.epochs for record in state.stages}
        if method in EQUALLY_LONG:
            assert epochs == 2
        else:  # patience ended it, with a learning rate that need not know when
            assert state.stages[0].converged
            assert epochs < 1000
            assert not state.config.training.cosine
    greedy = next(each for each in found.outcomes if each.method == GREEDY)
    probed = probe(Path(begun.out) / "runs" / GREEDY / "seed-0", "kind").stages
    assert greedy.errors == tuple(stage.error for stage in probed)


def test_recordings_of_several_lengths_standardise_what_each_layer_reads(
    tiny_options: dict[str, dict[str, object]], few_digits: Path, tmp_path: Path
) -> None:
    places = {"data.source": f"fsdd:{few_digits}", "out": str(tmp_path / "run"), "cache.dir": str(tmp_path / "cache")}
    config = resolve(overrides={**tiny_options["convolutions"], **places, "net.centred": True, "net.dense": True})
    run(config)
    for name, values in weights(config).items():
        if name.endswith((".mean", ".deviation")):
            untouched = 0 if name.endswith(".mean") else 1
            assert (values == untouched).all() == name.startswith("layers.0.")  # a waveform stays as it is


def test_first_weights_are_taken_from_real_frames_alone() -> None:
    windows = [torch.full((1, length, 2), float(length)) for length in (6, 12, 1, 7)]
    pieces = _in_equal_pieces(windows)
    assert pieces.shape == (4, 6, 2)
    assert pieces[:, 0, 0].tolist() == [6, 12, 12, 7]  # one frame alone would make all pieces as short
    assert torch.equal(
        _in_equal_pieces([torch.arange(6.0).view(1, 3, 2)] * 2), torch.arange(6.0).view(1, 3, 2).repeat(2, 1, 1)
    )


@pytest.fixture
def mirrored(config: Callable[..., Config]) -> Path:
    """The folder of a run whose pictures and their mirror images give the same."""
    run(config("exported", **{"training.max_epochs": 1, "net.mirrored": True}))
    return Path(config("exported").out)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_program_takes_more_pictures_than_the_network_takes_at_once(mirrored: Path, tmp_path: Path) -> None:
    layerwise.export(mirrored, tmp_path / "encoder", "pt2")
    program, x = torch.export.load(tmp_path / "encoder" / "encoder.pt2").module(), torch.randn(AT_ONCE + 8, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(program(x), layerwise.load(mirrored)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_onnx_runtime_has_every_operation_of_convnet(mirrored: Path, tmp_path: Path) -> None:
    """In the float64 of contrasts, too."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert layerwise.export(mirrored, tmp_path / "graph", "onnx").difference < 1e-5

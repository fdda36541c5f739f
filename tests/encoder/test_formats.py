"""`layerwise.export`: every format computes what the encoder does, or nothing is left; the card says what is true."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import layerwise
from layerwise.encoder import export as formats
from layerwise.encoder.export import Exported
from layerwise.encoder.load import load
from layerwise.encoder.program import StepwiseGRU
from layerwise.engines.run import RunResult, UserObjects
from layerwise.errors import ExportError, LayerwiseError, RunError
from layerwise.events import silent
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network
from layerwise.nets.speech import Recurrence

FORMATS = ["safetensors", "pt2", "onnx"]


def needs(format: str) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


def computes(folder: Path, format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the exported file computes, read as a user would."""
    if format == "safetensors":
        return layerwise.load(folder)
    if format == "pt2":
        return torch.export.load(folder / "encoder.pt2").module()
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "encoder.onnx")
    (given,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


@pytest.fixture(scope="module")
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Exported]:
    """exported("speech_run" or "vision_run", format): what that run was exported to, for all tests to read."""

    @cache
    def export(kind: str, format: str) -> Exported:
        needs(format)
        result: RunResult = request.getfixturevalue(kind)
        return layerwise.export(result.paths.out, tmp_path_factory.mktemp("exported") / "encoder", format)

    return export


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["speech_run", "vision_run"])
def test_every_format_computes_what_the_encoder_does_at_other_sizes_too(
    request: pytest.FixtureRequest, exported: Callable[[str, str], Exported], kind: str, format: str
) -> None:
    written = exported(kind, format)
    assert written.difference < 1e-5
    assert written.fixed == ""
    result: RunResult = request.getfixturevalue(kind)
    encoder, found = layerwise.load(result.paths.out), computes(written.folder, format)
    speech = [torch.randn(size) * 0.1 for size in ((1, 700), (5, 1600), (2, 9001))]
    pictures = [torch.rand(size) for size in ((1, 3, 32, 32), (4, 3, 60, 44))]
    for x in speech if kind == "speech_run" else pictures:
        with torch.no_grad():
            torch.testing.assert_close(found(x), encoder(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["speech_run", "vision_run"])
def test_the_code_of_the_card_runs_as_it_stands(
    request: pytest.FixtureRequest,
    exported: Callable[[str, str], Exported],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    format: str,
) -> None:
    folder = exported(kind, format).folder
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    if (kind, format) == ("speech_run", "pt2"):  # a program of torch.export needs what layerwise has imported here
        printed = printed_by_a_new_process(code, folder)
    else:
        monkeypatch.chdir(folder)
        exec(code, {})
        printed = capsys.readouterr().out
    frames = layerwise.load(request.getfixturevalue(kind).paths.out).out_length(1600)
    assert (f"2, {frames}, 32" if kind == "speech_run" else "2, 49, 64") in printed


def printed_by_a_new_process(code: str, folder: Path) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_card_says_what_the_run_has_recorded(speech_run: RunResult, tmp_path: Path, digits: Path) -> None:
    probe = layerwise.probe(speech_run.paths.out, "digit")
    layerwise.export(speech_run.paths.out, tmp_path / "digits encoder")
    card = (tmp_path / "digits encoder" / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in layerwise.load(speech_run.paths.out).parameters())
    for said in (
        "# Encoder of recordings",
        f"{parameters:,} parameters",
        "in 4 gradient-isolated stages",
        "48 samples of `fsdd`",
        "at 8000 Hz",
        "one frame every 80 samples (10 ms)",
        "infonce (steps 3, skip 0, negatives 4, anchors 16)",
        "no device budget.",
        f"| 4 | {100 * probe.stages[3].error:.1f} % | {100 * probe.stages[3].untrained_error:.1f} % | 24 |",
        f"{speech_run.state.stages[2].best_loss:.4f}",
        f"with layerwise {layerwise.__version__}",
        "None was chosen",
    ):
        assert said in card, said


@pytest.mark.parametrize("format", FORMATS)
def test_no_paths_of_the_machine_are_handed_over(
    speech_run: RunResult, digits: Path, exported: Callable[[str, str], Exported], format: str
) -> None:
    folder = exported("speech_run", format).folder
    places = [str(place).encode() for place in (digits, speech_run.paths.out, folder, Path(layerwise.__file__).parent)]
    for path in folder.iterdir():
        content = path.read_bytes()  # pt2 archives store their members as they are
        assert not [place for place in places if place in content], path.name


def test_an_exported_folder_is_loaded_and_extracted_from_like_a_run(
    speech_run: RunResult, digits: Path, tmp_path: Path
) -> None:
    layerwise.export(speech_run.paths.out, tmp_path / "encoder")
    for place, name in ((tmp_path / "encoder", "one.npy"), (speech_run.paths.out, "other.npy")):
        layerwise.extract(place, digits, tmp_path / name)
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "other.npy"))


def test_what_computes_something_else_is_deleted(
    speech_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*arguments: object) -> formats.Written:
        written = formats.write_safetensors(*arguments)
        encoder = written.computes
        return formats.Written(lambda x: encoder(x) * 1.01, written.inputs)

    def shorter(*arguments: object) -> formats.Written:
        written = formats.write_safetensors(*arguments)
        encoder = written.computes
        return formats.Written(lambda x: encoder(x)[:, 1:], written.inputs)

    for write, message in ((spoilt, "differs from the encoder by 0.01"), (shorter, "gives features of shape")):
        monkeypatch.setitem(formats.FORMATS, "safetensors", write)
        with pytest.raises(ExportError, match=message):
            layerwise.export(speech_run.paths.out, tmp_path / "encoder")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["safetensors", "pt2"])
def test_an_export_that_is_larger_than_files_may_be_is_a_sentence(
    speech_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """In a process of its own, which torch would end while it closes the file."""
    x = torch.zeros(1, 64)
    program = torch.export.export(nn.Linear(64, 64), (x,))  # recorded in a second, where an encoder takes ten
    monkeypatch.setattr(formats, "record", lambda encoder: (program, [x], ""))
    said = tmp_path / "said"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            layerwise.export(speech_run.paths.out, tmp_path / "encoder", format)
        except LayerwiseError as error:
            said.write_text(str(error))

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "cannot be written: File too large" in said.read_text()
    assert list(tmp_path.iterdir()) == [said]


def test_what_a_kill_leaves_of_an_export_is_cleared_and_what_a_link_leads_to_is_not(
    speech_run: RunResult, tmp_path: Path
) -> None:
    (tmp_path / "theirs" / "encoder").mkdir(parents=True)
    (tmp_path / "theirs" / "encoder" / "notes").touch()
    (tmp_path / ".encoder.part").symlink_to("theirs")
    layerwise.export(speech_run.paths.out, tmp_path / "encoder")
    assert (tmp_path / "theirs" / "encoder" / "notes").exists()
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["encoder"]
    shutil.rmtree(tmp_path / "encoder")
    (tmp_path / ".encoder.part" / "encoder").mkdir(parents=True)
    (tmp_path / ".encoder.part" / "encoder" / "half").touch()
    layerwise.export(speech_run.paths.out, tmp_path / "encoder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "theirs"]
    assert not (tmp_path / "encoder" / "half").exists()


class InFloat64(nn.Module):
    """What onnxruntime has in float32 alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x.double(), 2).float()


class Bessel(nn.Module):
    """What ONNX has not at all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j1(x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("lacking", "message"),
    [(InFloat64(), r"onnxruntime cannot .*AveragePool"), (Bessel(), r"torch.onnx cannot .*bessel_j1")],
    ids=lambda value: type(value).__name__,
)
def test_what_onnx_cannot_do_is_a_sentence_that_names_it(tmp_path: Path, lacking: nn.Module, message: str) -> None:
    needs("onnx")
    pictures = [np.random.default_rng(i).random((1, 8, 8), dtype=np.float32) for i in range(8)]
    model, run = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), lacking), tmp_path / "run"
    places = {"out": run, "cache_dir": tmp_path / "cache", "notify": silent}
    layerwise.run(model, pictures, frames="whole", max_epochs=1, batch_size=4, views=2, **places)
    with pytest.raises(ExportError, match=message + r".*\); export it as pt2 or safetensors"):
        layerwise.export(run, tmp_path / "encoder", "onnx", network=model)
    assert not (tmp_path / "encoder").exists()


def test_a_second_export_to_the_same_folder_is_refused(
    speech_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*arguments: object) -> formats.Written:
        monkeypatch.undo()
        with pytest.raises(ExportError, match=r"Another process is writing .*encoder; wait for it"):
            layerwise.export(speech_run.paths.out, tmp_path / "encoder")
        return formats.write_safetensors(*arguments)

    monkeypatch.setitem(formats.FORMATS, "safetensors", meanwhile)
    layerwise.export(speech_run.paths.out, tmp_path / "encoder")
    assert (tmp_path / "encoder" / "README.md").exists()


def test_missing_packages_are_a_sentence(
    speech_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ExportError, match=r"needs onnxscript: pip install 'layerwise\[onnx\]'"):
        layerwise.export(speech_run.paths.out, tmp_path / "encoder", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_requests_that_cannot_be_met_are_sentences(speech_run: RunResult, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--format tflite: there are safetensors, state-dict, pt2, onnx"):
        layerwise.export(speech_run.paths.out, tmp_path / "encoder", "tflite")
    with pytest.raises(ExportError, match="exists; delete it, or name another folder"):
        layerwise.export(speech_run.paths.out, tmp_path)
    with pytest.raises(RunError, match="is not a run directory"):
        layerwise.export(tmp_path, tmp_path / "encoder")


class FixedLength(Layer):
    """A convolution that knows how many frames its example had, as some layers do."""

    recurrent = False

    def __init__(self, frames: int | None) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 8)
        self.frames = frames

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # As many tensors as frames: torch.export writes each of them down.
        return torch.stack([self.scale(frame) for frame in x.unbind(1)], 1)


def test_where_a_layer_ties_the_length_down_the_card_says_so(
    run_tiny: Callable[..., RunResult], write_tone: Callable[..., Path], tmp_path: Path
) -> None:
    for number in range(6):
        folder = write_tone(f"recordings/{number}.wav", 0.03).parent
    network = Network([partial(FixedLength, None)], natural_cut=(1,), identity="fixed")
    options = {"data.window": 80, "training.stages": 1}
    result = run_tiny("speech", f"speech:{folder}", UserObjects(network), **options)
    written = layerwise.export(result.paths.out, tmp_path / "encoder", "pt2", network=network)
    assert written.fixed == "80 samples of each waveform"
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "In this file the size of the input is fixed: 80 samples of each waveform." in card
    found, encoder = computes(tmp_path / "encoder", "pt2"), load(result.paths.out, network=network)
    x = torch.randn(5, 80)
    torch.testing.assert_close(found(x), encoder(x), rtol=1e-4, atol=1e-5)


def test_a_stepwise_recurrence_is_the_recurrence() -> None:
    torch.manual_seed(0)
    recurrence, x = Recurrence(6, 5), torch.randn(3, 40, 6)
    with torch.no_grad():
        torch.testing.assert_close(StepwiseGRU(recurrence.gru)(x)[0], recurrence(x), rtol=1e-5, atol=1e-6)


def test_the_exported_options_make_the_same_network(speech_run: RunResult, tmp_path: Path) -> None:
    from layerwise.config import changed_options
    from layerwise.config import load as load_config

    layerwise.export(speech_run.paths.out, tmp_path / "encoder")
    old, new = load_config(speech_run.paths.config), load_config(tmp_path / "encoder" / "config.toml")
    assert changed_options(old, new, {"shape", "training"}) == []
    assert json.dumps(new.model_dump(mode="json")).count(str(speech_run.paths.out)) == 0

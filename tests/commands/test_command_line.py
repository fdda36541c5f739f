"""The command line as a person uses it: exit codes, one sentence per error, JSON that scripts can read."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
from records_edited import edited

import layerwise
from layerwise import commands
from layerwise import config as configuration
from layerwise.commands import layerwise as group
from layerwise.commands import main
from layerwise.data.open import open_data
from layerwise.errors import Interrupted, RunError
from layerwise.evaluate import probe as probing
from layerwise.files import exclusive

TINY = [
    *(
        "--set",
        "net.width=8",
        "--set",
        "net.context=0",
        "--set",
        "net.kernels=[10,8,4,4]",
        "--set",
        "net.strides=[5,4,2,2]",
    ),
    *("--set", "net.paddings=[2,2,1,1]", "--set", "objective.steps=3", "--set", "objective.anchors=16"),
    *("--set", "data.sample_rate=8000", "--set", "data.window=1600", "--max-epochs", "1", "--batch-size", "8"),
    *("--keep", "all"),
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments) gives exit code, stdout and stderr."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run_main


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `run` and its caches in `cache`."""
    folder = tmp_path_factory.mktemp("finished")
    places = ["--data", f"fsdd:{digits}", "--out", str(folder / "run"), "--cache-dir", str(folder / "cache")]
    with pytest.raises(SystemExit) as stopped:
        main(["run", *TINY, *places, "--gpu-mem", "40MB", "--stages", "4"])
    assert stopped.value.code == 0
    return folder


def test_status_prints_the_contracts_json(finished: Path, call: Callable) -> None:
    code, out, err = call("status", finished / "run", "--json")
    assert (code, err) == (0, "")
    status = json.loads(out)
    assert status.keys() == {"state", "budget_bytes", "device", "stages"}
    assert (status["state"], status["budget_bytes"], status["device"]) == ("done", 40_000_000, "cpu")
    required = {"stage", "status", "epochs", "converged", "best_loss", "peak_bytes", "micro_batch", "cache"}
    required |= {"cache_bytes", "fingerprint", "seconds"}
    assert all(required <= stage.keys() for stage in status["stages"])


def test_status_shows_a_table(finished: Path, call: Callable) -> None:
    code, out, _ = call("status", finished / "run")
    assert code == 0
    assert "reached max epochs" in " ".join(out.split())
    assert "device peak" in out


def test_probe_prints_the_contracts_json(finished: Path, call: Callable) -> None:
    code, out, _ = call("probe", finished / "run", "--label", "speaker", "--json")
    assert code == 0
    probe = json.loads(out)
    assert probe["label"] == "speaker"
    assert [stage["stage"] for stage in probe["stages"]] == [1, 2, 3, 4]
    for stage in probe["stages"]:
        assert stage.keys() == {"stage", "error", "untrained_error", "train", "test", "confusion", "weights"}
        assert 0 <= stage["error"] <= 1
        assert (stage["train"], stage["test"]) == (24, 24)


def test_several_labels_are_told_apart_on_data_that_are_opened_once(
    finished: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def counted(*arguments: Any) -> Any:
        opened.append(arguments)
        return open_data(*arguments)

    monkeypatch.setattr(probing, "open_data", counted)
    asked = ("probe", finished / "run", "--label", "speaker", "--label", "digit", "--label", "speaker")
    code, out, _ = call(*asked)
    assert code == 0
    assert [out.count(f"{label} error") for label in ("speaker", "digit")] == [1, 1]
    assert len(opened) == 1
    assert [probe["label"] for probe in json.loads(call(*asked, "--json")[1])] == ["speaker", "digit"]
    code, out, err = call(*asked[:4], "--label", "mood", "--json")
    assert code == 2
    assert "mood" in err
    assert [probe["label"] for probe in json.loads(out)] == ["speaker"]  # what was known is told


def test_a_probe_of_another_grid_is_kept_beside_the_first(finished: Path, call: Callable) -> None:
    kept = finished / "run" / "probes" / "digit.json"
    before = kept.read_bytes()
    code, out, _ = call("probe", finished / "run", "--label", "digit", "--grid", 2)
    assert code == 0
    assert "digit error" in out
    assert kept.read_bytes() == before
    assert json.loads(kept.with_name("digit-grid2.json").read_text())["grid"] == 2


def test_compare_prints_the_contracts_json_and_a_table(digits: Path, call: Callable) -> None:
    command = ["compare", *TINY, "--data", f"fsdd:{digits}", "--label", "digit", "--seeds", "1"]
    code, out, err = call(*command, "--methods", "cpc,untrained", "--json")
    assert code == 0
    assert "cpc, seed 0" in err
    tree = json.loads(out)
    assert tree["label"] == "digit"
    assert [method["method"] for method in tree["methods"]] == ["cpc", "untrained"]
    for method in tree["methods"]:
        assert method.keys() == {"method", "seeds", "peak_bytes", "disk_bytes", "seconds", "stages"}
        assert [stage["stage"] for stage in method["stages"]] == [1, 2, 3, 4]

    code, out, err = call(*command, "--methods", "cpc")  # nothing is left to do
    assert (code, "seed" in err) == (0, False)
    assert "cpc" in out
    assert Path("runs/compare-fsdd/compare.json").exists()


def test_compare_needs_a_label(digits: Path, call: Callable) -> None:
    code, _, err = call("compare", *TINY, "--data", f"fsdd:{digits}")
    assert (code, "--label" in err) == (2, True)


def test_report_says_where_it_lies(finished: Path, call: Callable) -> None:
    code, out, err = call("report", finished / "run")
    assert (code, err) == (0, "")
    assert out == f"{finished / 'run' / 'report.html'} (figures: {finished / 'run' / 'plots'})\n"
    assert (finished / "run" / "report.html").stat().st_size > 10_000


def test_the_summary_says_where_things_lie_and_what_to_type(digits: Path, call: Callable) -> None:
    code, out, err = call("run", *TINY, "--data", f"fsdd:{digits}", "--out", "my run")
    assert (code, err) == (0, "")
    assert "0 bytes left on it" in out
    assert "encoder   my run/encoder.safetensors" in out
    assert "  layerwise probe 'my run' --label digit --label speaker\n" in out
    assert "\x1b" not in out
    log = Path("my run/log.txt").read_text()
    assert "stage 4: reached max epochs (1)" in log


def test_run_goes_on_with_the_same_command(digits: Path, call: Callable) -> None:
    arguments = ("run", *TINY, "--data", f"fsdd:{digits}")
    assert call(*arguments)[0] == 0
    code, out, _ = call(*arguments)
    assert code == 0
    assert "training" not in out.split("stage  status")[0]


def test_version_and_help(call: Callable) -> None:
    assert call("--version")[1].startswith("layerwise, version ")
    code, out, _ = call("run", "--help")
    assert code == 0
    for option in configuration.options():
        if option.flag:
            assert option.flag in out


def test_help_groups_the_options_and_has_the_defaults_of_the_recipe(call: Callable) -> None:
    code, out, _ = call("run", "--recipe", "cifar10", "--help")
    assert code == 0
    epochs, budget = out.index("--max-epochs NUMBER"), out.index("--gpu-mem SIZE")
    assert out.index("The stage loop:") < epochs < out.index("The device budget:") < budget
    recipe = configuration.resolve("cifar10")
    assert f"[default: {recipe.training.max_epochs}]" in out[epochs : out.index("--rounds")]
    assert "[default: convnet]" in out
    assert "--stages NUMBER|fewest" in out
    assert "[default: vision]" in call("run", "--data", "images:pictures", "--help")[1]


def test_the_command_line_has_exactly_these_options() -> None:
    named = {option for parameter in group.commands["run"].params for option in parameter.opts}
    assert named == {
        *(
            "--recipe",
            "--config",
            "--data",
            "--labels",
            "--frames",
            "--net",
            "--stages",
            "--gpu-mem",
            "--out",
            "--cache-dir",
            "--max-epochs",
        ),
        *(
            "--patience",
            "--probe-every",
            "--batch-size",
            "--lr",
            "--precision",
            "--device",
            "--seed",
            "--from-stage",
            "--overwrite",
        ),
        *("--set", "--cache", "--cache-dtype", "--cache-compression", "--disk", "--keep", "--views"),
        *(
            "--objective",
            "--label",
            "--log",
            "--time",
            "--rounds",
            "--devices",
            "--engine",
            "--scheduler",
            "--partition",
        ),
        *("--deterministic", "--dry-run", "--warm-start", "--weights", "--at"),
    }


def recordings(folder: Path, count: int, seconds: float = 0.3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        samples = np.random.default_rng(number).standard_normal(round(8000 * seconds)) * 0.1
        soundfile.write(folder / f"{number}.wav", samples, 8000)
    return folder


BAD_REQUESTS = {
    "budget of nothing": (["--gpu-mem", "0"], "--gpu-mem: a budget of 0"),
    "budget of fruit": (["--gpu-mem", "4 bananas"], "'4 bananas' is not a size"),
    "negative budget": (["--gpu-mem=-4GB"], "--gpu-mem: "),
    "too many stages": (["--stages", "9"], "at most 4 stages"),
    "no stages": (["--stages", "0"], "--stages: "),
    "stages in words": (["--stages", "six"], "--stages: "),
    "unknown recipe": (["--recipe", "imagenet"], "the recipes are cifar10, cifar10-patches, demo"),
    "unknown data kind": (["--data", "video:x"], "--data video:x"),
    "data without a folder": (["--data", "speech"], "name the place too"),
    "missing folder": (["--data", "speech:nowhere"], "nowhere does not exist"),
    "missing picture folder": (["--data", "images:nowhere", "--recipe", "cifar10"], "nowhere does not exist"),
    "missing librispeech": (["--data", "librispeech:nowhere"], "nowhere does not exist"),
    "missing stl10": (["--data", "stl10:nowhere", "--recipe", "stl10"], "STL10 is not complete"),
    "missing cifar10": (["--data", "cifar10:nowhere", "--recipe", "cifar10"], "CIFAR10 is not complete"),
    "misspelt option": (["--set", "training.larning_rate=1"], "There is no option 'training.larning_rate'"),
    "set without a value": (["--set", "training.lr"], "write it as key=value"),
    "misspelt flag": (["--max-epoch", "3"], "--max-epochs"),
    "budget without a unit": (["--gpu-mem", "4"], "4 has no unit; write it like 4GB"),
    "option without its section": (["--set", "lr=3"], "There is no option 'lr'; did you mean training.lr?"),
    "half a stage": (["--stages", "2.5"], "--stages: must be a whole number"),
    "learning rate of zero": (["--lr", "0"], "--lr: "),
    "unknown objective": (["--objective", "infonec"], "--objective infonec: there is none"),
    "nothing to be supervised by": (["--objective", "supervised"], "name one: --label speaker"),
    "unknown precision": (["--precision", "float8"], "--precision: "),
    "unknown net": (["--net", "transformer"], "--net: "),
    "pictures for the speech net": (["--net", "vision"], "--net vision trains on pictures"),
    "device that is not there": (["--device", "cuda:7"], "--device cuda:7"),
    "device that does not exist": (["--device", "tpu"], "--device: "),
    "missing configuration": (["--config", "none.toml"], "none.toml cannot be read"),
    "from a stage that is not there": (["--from-stage", "3"], "would begin anew"),
    "window too small": (["--set", "data.window=60"], "data.window 60 is too small; give at least 161"),
    "kernels without strides": (["--set", "net.kernels=[3]"], "one entry per convolution"),
    "pattern without a group": (["--set", "data.pattern=abc"], "names no label"),
    "unknown service": (["--log", "paper"], "--log: input should be 'none', 'tensorboard', 'wandb' or 'mlflow'"),
    "window of nothing": (["--set", "data.window=0"], "data.window: "),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_request_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, call: Callable, tmp_path: Path
) -> None:
    folder = recordings(tmp_path / "recordings", 6)
    code, out, err = call("run", *TINY, "--data", f"speech:{folder}", *arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert err.startswith("layerwise: ")
    assert "Traceback" not in err
    assert err.strip().count("\n") == 0
    assert not Path("runs").exists() or not list(Path("runs").rglob("run.json"))
    assert not Path("cache").exists()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_recordings_are_a_sentence(count: int, call: Callable, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "recordings", count)
    code, _, err = call("run", *TINY, "--data", f"speech:{folder}")
    assert code == 2
    assert str(folder) in err or "usable samples" in err


def test_recordings_shorter_than_a_window_train_anyway(call: Callable, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "recordings", 8, seconds=0.1)
    code, out, _ = call("run", *TINY, "--data", f"speech:{folder}")
    assert code == 0, out


def test_recordings_that_give_no_frame_are_counted_and_refused(call: Callable, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "recordings", 8, seconds=0.002)
    code, _, err = call("run", *TINY, "--data", f"speech:{folder}")
    assert code == 2
    assert "0 usable recordings and 8 unusable ones; the first: 0.wav, lasts 0.002 s" in err


def test_skipped_recordings_are_named_and_counted(call: Callable, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "recordings", 8)
    (folder / "broken.wav").write_bytes(b"RIFF no sound")
    code, out, _ = call("run", *TINY, "--data", f"speech:{folder}")
    assert code == 0
    assert "1 files skipped:" in out
    assert "broken.wav: cannot be decoded" in out
    said = out[out.index("1 files skipped:") :].partition("stage")[0]
    assert said in call("plan", *TINY, "--data", f"speech:{folder}")[1]


def test_one_speaker_only_trains_but_cannot_be_told_apart(call: Callable, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "recordings", 8)
    assert call("run", *TINY, "--data", f"speech:{folder}", "--out", "one")[0] == 0
    code, _, err = call("probe", "one", "--label", "speaker")
    assert code == 2
    assert "nothing to tell apart" in err


def test_a_run_that_learned_nothing_says_so(finished: Path, call: Callable, digits: Path) -> None:
    places = ["--data", f"fsdd:{digits}", "--out", finished / "run", "--cache-dir", finished / "cache"]
    out = call("run", *TINY, *places, "--gpu-mem", "40MB", "--stages", "4")[1]
    assert "did not get clearly below chance, a loss of 2.398: train longer, or raise --lr." in out


def test_few_test_samples_are_pointed_out(finished: Path, call: Callable) -> None:
    assert "Only 24 test samples: one of them is 4.2 %." in call("probe", finished / "run", "--label", "digit")[1]


def test_probe_does_not_use_a_damaged_cache(finished: Path, call: Callable, tmp_path: Path) -> None:
    cache = finished / "cache" / "run" / "stage-2.h5"
    content = cache.read_bytes()
    with h5py.File(cache) as file:
        position = file["activations"].id.get_offset() + 100
    cache.write_bytes(content[:position] + b"XXXX" + content[position + 4 :])
    code, out, err = call("probe", finished / "run", "--label", "digit", "--json")
    cache.write_bytes(content)
    assert code == 0
    assert "stage-2.h5 is damaged" in err
    stages, undamaged = (
        json.loads(each)["stages"] for each in (out, call("probe", finished / "run", "--label", "digit", "--json")[1])
    )
    assert [stage["error"] for stage in stages] == pytest.approx([stage["error"] for stage in undamaged], abs=0.05)


def test_status_tells_a_stopped_run_from_a_running_one_and_missing_caches(finished: Path, call: Callable) -> None:
    cache = finished / "cache" / "run" / "stage-3.h5"
    hidden, content = cache.rename(cache.with_name("hidden")), (finished / "run" / "run.json").read_bytes()
    with edited(finished / "run" / "run.json") as state:
        state["stages"][3]["status"] = "training"
    stopped = call("status", finished / "run")[1]
    with exclusive(finished / "run" / "lock", RunError("busy")):
        running = call("status", finished / "run")[1]
    (finished / "run" / "run.json").write_bytes(content)
    hidden.rename(cache)
    assert "stopped: device peak" in stopped
    assert "training (1)" in stopped
    assert "missing" in stopped
    assert "running: device peak" in running


def test_an_unknown_label_lists_the_known_ones(finished: Path, call: Callable) -> None:
    code, _, err = call("probe", finished / "run", "--label", "mood")
    assert code == 2
    assert "have no label 'mood'; they have digit, speaker" in err


@pytest.mark.parametrize("command", [["status"], ["report"], ["probe", "--label", "speaker"]])
def test_commands_on_what_is_no_run_are_a_sentence(command: list[str], call: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        code, _, err = call(command[0], folder, *command[1:])
        assert code == 2
        assert "run directory" in err
    (tmp_path / "empty" / "run.json").write_text("{}")
    code, _, err = call(command[0], tmp_path / "empty", *command[1:])
    assert code == 2
    assert "damaged" in err


def test_an_output_folder_that_holds_something_else_stays_as_it_is(call: Callable, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").write_text("years")
    folder = recordings(tmp_path / "recordings", 6)
    for extra in ([], ["--overwrite"]):
        code, _, err = call("run", *TINY, "--data", f"speech:{folder}", "--out", tmp_path / "thesis", *extra)
        assert code == 2
        assert "holds something else (main.tex)" in err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["main.tex"]


def test_no_room_on_the_disk_is_a_sentence(
    call: Callable, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    code, _, err = call("run", *TINY, "--data", f"fsdd:{digits}")
    assert code == 2
    assert "No room is left on the disk" in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "here")
    assert call("run", *TINY, "--data", f"fsdd:{digits}")[0] == 0


def test_a_place_that_cannot_be_written_is_a_sentence(call: Callable, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "recordings", 6)
    (tmp_path / "file").write_text("")
    for option in ("--out", "--cache-dir"):
        code, _, err = call("run", *TINY, "--data", f"speech:{folder}", option, tmp_path / "file" / "below")
        assert code == 2
        assert "cannot be written" in err


def test_a_defect_of_ours_is_exit_code_1(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["layerwise.commands.status"], "open_run", lambda path: 1 / 0)
    code, _, err = call("status", "x")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "a defect of layerwise" in err


def test_ctrl_c_while_an_earlier_one_is_told_ends_with_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each at once, where a run is quick to save: Python itself would end with another code, as killed."""
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        signal.raise_signal(signal.SIGINT)

    def stopped(*arguments: object, **options: object) -> None:
        raise Interrupted("Stopped by SIGINT; start the same command again to go on.")

    monkeypatch.setattr(commands, "remark", tell)
    monkeypatch.setattr(group, "main", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["run"])
    assert (ended.value.code, len(told)) == (75, 1)


def test_the_launcher_of_a_checkout_is_the_same_command() -> None:
    launcher = Path(__file__).resolve().parents[2] / "cli.py"
    result = subprocess.run([sys.executable, launcher, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("layerwise, version")


def test_help_and_status_do_not_wait_for_torch() -> None:
    code = "import sys, layerwise.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_api_is_there() -> None:

    for name in layerwise.__all__:
        assert getattr(layerwise, name)
    with pytest.raises(AttributeError, match="has no attribute 'trian'; it has BudgetError, Comparison"):
        layerwise.trian  # noqa: B018


def test_a_run_stops_by_itself_before_its_time_is_over_and_goes_on(call: Callable, digits: Path) -> None:
    options = ["run", *TINY, "--data", f"fsdd:{digits}", "--out", "limited", "--max-epochs", "100000"]
    options += ["--patience", "100000"]
    code, _, err = call(*options, "--time", "4s")
    assert code == 75
    assert "Stopped by --time 4s in stage 1" in err
    code, out, err = call(*options, "--time", "00:00:03")
    assert code == 75
    assert "going on in epoch" in out
    assert "Stopped by --time 00:00:03" in err


def test_a_batch_job_that_gets_nowhere_is_not_started_for_ever(
    call: Callable, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho JobState=RUNNING Reason=None Restarts=3 BatchFlag=1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    code, _, err = call("run", *TINY, "--data", f"fsdd:{digits}", "--time", "0.001s")
    assert code == 2
    assert "started 3 times in a row" in err
    assert "not queued again" in err

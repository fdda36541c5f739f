"""`layerwise doctor`: what it finds, also where something is broken."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from layerwise.commands import main
from layerwise.doctor import examine, host, torch_checks
from layerwise.doctor.torch_checks import TorchReport, ask_torch

ROOT = Path(__file__).resolve().parents[2]
H100 = {"name": "H100", "free": 79 * 10**9, "total": 80 * 10**9}
VERSIONS = {"torch": "2.12.1", "torchvision": "0.27.1", "torchaudio": "2.11.0"}

Package = Callable[[str, str], None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """package(name, code) puts a module in front of the installed one of that name, for processes that are started."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=os.pathsep)

    def write(name: str, code: str) -> None:
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").write_text(code)

    return write


@pytest.fixture
def torch_that_imports(package: Package) -> None:
    """The three of them as small as can be: the real ones take seconds to import."""
    for name, version in VERSIONS.items():
        package(name, f"__version__ = {version!r}")


def test_a_sound_machine_exits_with_0_and_one_object(
    torch_that_imports: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "WRITTEN", host.PIECE)
    monkeypatch.setattr(torch_checks, "driver_cuda", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--json", "--cache-dir", str(tmp_path / "not" / "yet")])
    out, err = capfd.readouterr()
    told = json.loads(out)
    broken = [finding for finding in told["findings"] if finding["verdict"] == "fix"]
    assert (stopped.value.code, err, told["fit"], broken) == (0, "", True, [])
    checks = {finding["check"] for finding in told["findings"]}
    assert {
        "Python",
        "torch",
        "torchvision",
        "torchaudio",
        "GPU",
        "HDF5",
        "cache reads",
        "disk",
        "disk speed",
        "locks",
    } <= checks
    assert {"memory", "cores", "Slurm", "container", "extra onnx"} <= checks
    assert not (tmp_path / "not").exists()


def test_it_works_where_torch_does_not_import(package: Package, tmp_path: Path) -> None:
    package("torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'packages'}:{ROOT}"}
    command = [sys.executable, "-m", "layerwise", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(
        r"^fix   torch: +does not import: libcudart.*pip install -c constraints", done.stdout, re.MULTILINE
    )
    assert re.search(r"^ok    HDF5: ", done.stdout, re.MULTILINE)
    assert done.stderr == "layerwise: To be fixed: torch.\n"


@pytest.mark.parametrize(
    "code", ["raise RuntimeError('operator torchvision::nms does not exist')", "import os; os.abort()"]
)
def test_a_companion_of_another_torch_is_named_with_the_fix(
    package: Package, torch_that_imports: None, code: str
) -> None:
    package("torchvision", code)
    report = ask_torch()
    found = {finding.check: finding for finding in torch_checks.companions(report)}
    assert torch_checks.torch(report).verdict == "ok"
    assert found["torchvision"].verdict == "note"
    assert "does not import beside torch 2.12.1" in found["torchvision"].found
    assert "pip install 'torchvision==0.27.*'" in found["torchvision"].advice


def test_a_machine_that_is_slow_has_nothing_to_be_fixed(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    package("torch", "import time; time.sleep(60)")
    monkeypatch.setattr(torch_checks, "TORCH_SECONDS", 0.5)
    report = ask_torch()
    assert torch_checks.torch(report).verdict == "note"
    assert torch_checks.companions(report) == []


@pytest.mark.parametrize(
    ("report", "driver", "verdict", "words"),
    [
        (TorchReport(VERSIONS, cuda="13.0"), None, "ok", "cpu"),
        (TorchReport(VERSIONS, cuda="13.0", gpus=[H100]), "13.0", "ok", "H100, 79 GB of 80 GB free"),
        (TorchReport(VERSIONS, cuda="13.0", gpus=[H100 | {"free": 10**9}]), "13.0", "note", "1 GB of 80 GB free"),
        (TorchReport(VERSIONS, cuda="13.0"), "12.8", "fix", "the driver offers CUDA 12.8, torch was built for 13.0"),
        (TorchReport(VERSIONS, cuda=None), "12.8", "fix", "built without CUDA"),
        (TorchReport(VERSIONS, cuda="12.6", gpu_error="no device."), "12.8", "fix", "torch finds no GPU: no device"),
        (TorchReport(), "12.8", "note", "torch cannot say more"),
    ],
)
def test_what_torch_was_built_for_is_compared_with_the_driver(
    report: TorchReport, driver: str | None, verdict: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch_checks, "driver_cuda", lambda: driver)
    (finding,) = torch_checks.gpus(report)
    assert (finding.verdict, words in finding.found) == (verdict, True), finding


def test_the_driver_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0     |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert torch_checks.driver_cuda() == "13.0"


def test_a_check_that_fails_says_so_and_the_others_go_on(
    torch_that_imports: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(examine, "memory", lambda: 1 / 0)
    monkeypatch.setattr(host, "WRITTEN", host.PIECE)
    found = {finding.check: finding for finding in examine.examine(tmp_path)}
    assert found["memory"].found == "could not be examined: ZeroDivisionError: division by zero"
    assert found["cores"].verdict == "ok"


def test_a_full_disk_is_a_finding_and_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "WRITTEN", host.PIECE)
    assert host.write_speed(tmp_path).verdict in ("ok", "note")
    assert list(tmp_path.iterdir()) == []

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    finding = host.write_speed(tmp_path)
    assert (finding.verdict, "No space left on device" in finding.found) == ("fix", True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_to_be_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    assert host.can_lock(tmp_path).verdict == "ok"
    monkeypatch.setattr(fcntl, "flock", without)
    finding = host.can_lock(tmp_path)
    assert (finding.verdict, "can be locked: Function not implemented" in finding.found) == ("fix", True)


def test_a_file_where_the_caches_should_lie_is_to_be_fixed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = host.disk_room(tmp_path / "file" / "cache")
    assert (finding.verdict, "is not a folder" in finding.found) == ("fix", True)


def test_the_least_limit_of_the_control_groups_counts(tmp_path: Path) -> None:
    (tmp_path / "job" / "step").mkdir(parents=True)
    assert host.memory_limit(tmp_path, "/job/step") is None
    (tmp_path / "job" / "memory.max").write_text("8000000000\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    assert host.memory_limit(tmp_path, "/job/step") == 8 * 10**9


def test_whether_cache_reads_are_compiled_is_said(tmp_path: Path) -> None:
    missing = examine.cache_reads(tmp_path)
    (tmp_path / "compiled_reads.abi3.so").write_bytes(b"for another machine")
    broken = examine.cache_reads(tmp_path)
    assert [finding.verdict for finding in (missing, broken)] == ["note", "note"]
    assert "could not be built" in missing.found
    assert "does not load" in broken.found
    assert all("gcc" in finding.advice for finding in (missing, broken))


@pytest.mark.skipif(
    find_spec("layerwise.cache.compiled_reads") is None, reason="layerwise was installed without a compiler"
)
def test_compiled_cache_reads_are_found() -> None:
    assert examine.cache_reads().verdict == "ok"


def test_the_extras_are_those_of_setup_py() -> None:
    declared = re.search(r"extras_require=\{(.*)\n    \},", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert declared
    assert set(examine.EXTRAS) == set(re.findall(r'^        "(\w+)": ', declared[1], re.MULTILINE)) - {"dev", "docs"}

"""`make gpu-check` from end to end, small, on the simulated GPU. What a real one alone can show is said not to have run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from simulated_gpu import SimulatedGPU

from layerwise.engines.run import UserObjects, run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import checks  # noqa: E402
import gpu_check  # noqa: E402
import gpu_promises  # noqa: E402
from gpu_trace import Traced  # noqa: E402

NEEDS_A_REAL_ONE = {"busy, small batch", "busy, large batch"}


def check(name: str) -> checks.Check:
    return next(each for each in gpu_promises.CHECKS if each.name == name)


def outcome(name: str, bench: gpu_promises.Bench) -> checks.Outcome:
    return next(checks.in_turn([check(name)], bench, time.time() + 1000))


@pytest.fixture
def bench(gpu: SimulatedGPU, tmp_path: Path) -> gpu_promises.Bench:
    return gpu_promises.Bench("small", str(tmp_path))


def test_every_promise_is_measured(
    bench: gpu_promises.Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kept" / "figures.json"
    outcomes = checks.in_turn(gpu_promises.CHECKS, bench, time.time() + 1000)
    assert gpu_check.report(outcomes, "small", path, time.time()) == 3
    known = {each["name"]: each for each in json.loads(path.read_text())["checks"]}
    assert list(known) == [each.name for each in gpu_promises.CHECKS]
    for name, each in known.items():
        assert each["status"] == ("not run" if name in NEEDS_A_REAL_ONE else "passed"), each
        assert each["rows"]
    printed = capsys.readouterr().out
    assert printed.count("PASS ") == len(known) - 2
    assert printed.count("NOT RUN ") == 2
    assert "the figures say nothing of the card" in printed


def test_memory_beyond_the_budget_breaks_the_promise(
    bench: gpu_promises.Bench, gpu: SimulatedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_in_more(*args: object, **options: object) -> object:
        gpu.context += 10**9
        return run(*args, **options)

    monkeypatch.setattr(gpu_promises, "run", run_in_more)
    seen = outcome("memory 1GB", bench)
    assert seen.status == "failed"
    assert all(row["sampled_mb"] > row["budget_mb"] for row in seen.rows)


def test_a_budget_that_the_card_has_not_is_not_measured(bench: gpu_promises.Bench, gpu: SimulatedGPU) -> None:
    gpu.others = gpu.total - gpu.context - 10**9
    seen = outcome("memory 2GB", bench)
    assert (seen.status, seen.rows) == ("not run", [])
    assert seen.why == "the card has 1000 MB free, and the budget is 2000 MB"


def test_other_weights_break_the_promise_of_the_same_bits(bench: gpu_promises.Bench) -> None:
    batch = bench.size.batches[0]
    config, data = bench.task(batch, 4 * batch, **{"training.seed": 1, "memory.micro_batch": batch})
    bench.runs.append(run(config, UserObjects(data=data)))
    seen = outcome("same bits twice", bench)
    assert (seen.status, seen.why) == ("failed", "not so in 1 of 1 rows")
    assert seen.rows[0]["largest_difference"] > 0


def test_what_stays_on_the_device_breaks_the_promise(
    bench: gpu_promises.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def run_and_keep(*args: object, **options: object) -> object:
        result = run(*args, **options)
        kept.append(torch.ones(1000, device="cuda"))
        return result

    monkeypatch.setattr(gpu_promises, "run", run_and_keep)
    assert outcome("left behind", bench).status == "failed"


def test_a_trace_is_counted() -> None:
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 100, "dur": 50},
        {"cat": "kernel", "name": "add", "ts": 120, "dur": 60},
        {"cat": "kernel", "name": "add", "ts": 300, "dur": 20},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 90, "dur": 5},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "ts": 200, "dur": 5},
        {"cat": "cuda_runtime", "name": "cudaDeviceSynchronize", "ts": 500, "dur": 5},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 80, "dur": 5},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 330, "dur": 5},
        {"ph": "M", "name": "process_name"},
    ]
    seen = Traced.of(events, steps=2, seconds=0.001)
    assert seen == Traced(2, 0.001, 100e-6, kernels=3, copies=1, waits=1)
    assert seen + seen == Traced(4, 0.002, 200e-6, kernels=6, copies=2, waits=2)


def test_without_a_gpu_one_sentence_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = subprocess.run([sys.executable, BENCHMARKS / "gpu_check.py"], capture_output=True, text=True)
    assert script.returncode == 2
    assert script.stderr == f"torch {torch.__version__} sees no CUDA device, so there is nothing to check.\n"
    assert script.stdout == ""

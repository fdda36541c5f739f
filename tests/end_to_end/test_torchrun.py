"""The real command under torchrun: two ranks end where one process does, whatever befalls them on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from safetensors.numpy import load_file

SECONDS = 55
"""Each launch must end by then; two interpreters that import torch take most of it on a busy machine."""

STAGES = 4


@pytest.fixture
def command(digits: Path, tiny_options: dict[str, dict[str, object]], tmp_path: Path) -> Callable[..., list[str]]:
    """command(folder, *more options) is `layerwise run` on the digits into that folder, without the interpreter."""

    def build(folder: str, *more: str) -> list[str]:
        out, caches = tmp_path / folder / "run", tmp_path / folder / "cache"
        options = {**tiny_options["speech"], "training.stages": STAGES}
        sets = [
            word for key, value in options.items() for word in ("--set", f"{key}={json.dumps(value).strip(chr(34))}")
        ]
        places = ["--data", f"fsdd:{digits}", "--out", str(out), "--cache-dir", str(caches)]
        return ["-m", "layerwise", "run", *places, *sets, *more]

    return build


Launch = Callable[..., subprocess.Popen]


@pytest.fixture
def launch(command: Callable[..., list[str]], tmp_path: Path) -> Launch:
    """launch(folder, *more options, ranks=2, restarts=0) starts the command in as many processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def begin(folder: str, *more: str, ranks: int = 2, restarts: int = 0) -> subprocess.Popen:
        start = [sys.executable]
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            start += [*torchrun, "--max-restarts", str(restarts), "--monitor-interval", "0.2"]
        return subprocess.Popen(
            [*start, *command(folder, *more)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return begin


def finish(process: subprocess.Popen) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return out, err


def finished(process: subprocess.Popen) -> str:
    out, err = finish(process)
    assert process.returncode == 0, err
    return out


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, f"ended before it could be disturbed: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def bits(folder: Path) -> dict[str, bytes]:
    weights = {name: value.tobytes() for name, value in load_file(folder / "run" / "encoder.safetensors").items()}
    return weights | caches(folder)


def caches(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cache" / "run").glob("*.h5*")}


def losses(folder: Path, stage: int) -> list[float]:
    lines = (folder / "run" / "stages" / str(stage) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines for key in ("loss", "held_out_loss")]


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that torchrun has started, by their rank."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [entry.partition(b"=")[2] for entry in environment if entry.startswith(b"RANK=")]
        if rank:
            found[int(rank[0])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def test_two_ranks_end_where_one_process_does_and_always_with_the_same_bits(launch: Launch, tmp_path: Path) -> None:
    started = [launch("alone", ranks=1), launch("first")]
    printed = [finished(process) for process in started][1]
    finished(launch("second"))
    assert printed.count("stage 1: training") == 1  # one of them tells
    assert bits(tmp_path / "first") == bits(tmp_path / "second")
    for stage in range(1, STAGES + 1):
        assert losses(tmp_path / "first", stage) == pytest.approx(losses(tmp_path / "alone", stage), rel=1e-4)
        layouts = []
        for folder in ("alone", "first"):
            with h5py.File(tmp_path / folder / "cache" / "run" / f"stage-{stage}.h5") as file:
                activations = file["activations"]
                layouts.append(
                    (activations.shape, activations.dtype, activations.id.get_offset(), file.id.get_filesize())
                )
        assert layouts[0] == layouts[1]


def test_caches_that_two_ranks_write_hold_the_bytes_that_one_process_writes(launch: Launch, tmp_path: Path) -> None:
    int8 = ("--cache-dtype", "int8", "--views", "1")
    finished(launch("alone", *int8, ranks=1))
    expected = caches(tmp_path / "alone")
    assert len(expected) == STAGES
    for cache in (tmp_path / "alone" / "cache" / "run").glob("*.h5"):
        cache.unlink()
    finished(launch("alone", *int8))  # the same weights are there: the caches alone are written again
    assert caches(tmp_path / "alone") == expected


def test_a_rank_that_is_killed_is_started_again_and_ends_with_the_same_bits(launch: Launch, tmp_path: Path) -> None:
    often = ("--set", "training.checkpoint_seconds=0", "--max-epochs", "12")
    undisturbed = launch("undisturbed", *often)
    process = launch("killed", *often, restarts=3)
    checkpoint = tmp_path / "killed" / "run" / "stages" / "2" / "checkpoint.safetensors"
    wait_for(checkpoint.exists, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert "going on in epoch" in finished(process)
    finished(undisturbed)
    assert bits(tmp_path / "killed") == bits(tmp_path / "undisturbed")


@pytest.mark.parametrize("whom", ["torchrun", "the second rank"])
def test_a_signal_stops_all_ranks_and_the_same_command_goes_on(launch: Launch, tmp_path: Path, whom: str) -> None:
    often = ("--set", "training.checkpoint_seconds=0", "--max-epochs", "12")
    undisturbed = launch("undisturbed", *often)
    process = launch("stopped", *often)
    checkpoint = tmp_path / "stopped" / "run" / "stages" / "2" / "checkpoint.safetensors"
    wait_for(checkpoint.exists, process)
    os.kill(process.pid if whom == "torchrun" else ranks_of(process)[1], signal.SIGTERM)
    _, err = finish(process)
    assert process.returncode != 0
    assert "layerwise: Stopped by SIGTERM in stage 2" in err
    assert err.count("layerwise: ") == 1
    assert not (tmp_path / "stopped" / "run" / "encoder.safetensors").exists()
    finished(undisturbed)
    assert "stage 2: going on in epoch" in finished(launch("stopped", *often))
    assert bits(tmp_path / "stopped") == bits(tmp_path / "undisturbed")


def test_what_ranks_cannot_share_is_refused_in_one_sentence(launch: Launch, tmp_path: Path) -> None:
    process = launch("refused", "--rounds", "2")
    _, err = finish(process)
    assert process.returncode != 0
    assert "layerwise: --rounds 2 and 2 processes to a stage do not go together" in err
    assert "defect" not in err
    assert not (tmp_path / "refused").exists()
    foreign = tmp_path / "foreign" / "run"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").touch()
    _, err = finish(launch("foreign"))
    assert err.count("holds something else (notes.txt)") == 1
    assert "defect" not in err
    shutil.rmtree(foreign)

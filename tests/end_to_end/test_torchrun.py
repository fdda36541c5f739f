"""The real command under torchrun: two ranks end where one process does, whatever befalls them on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest
from forked_python import ForkedPython
from safetensors.numpy import load_file
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler as starts_ranks
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from layerwise.config import Config, resolve

SECONDS = 200
"""Each launch must end by then; two interpreters that import torch take most of it on a busy machine."""

STAGES = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the folders of all launches lie."""
    return tmp_path_factory.mktemp("torchrun")


@pytest.fixture(scope="module")
def command(
    digits: Path,
    tiny_options: dict[str, dict[str, object]],
    place: Path,
    plan_ahead: Callable[[Config], None],
) -> Callable[..., list[str]]:
    """command(folder, *more options) is `layerwise run` on the digits into that folder, without the interpreter."""
    options = {**tiny_options["speech"], "training.stages": STAGES}
    plan_ahead(resolve(overrides={**options, "data.source": f"fsdd:{digits}"}))

    def build(folder: str, *more: str) -> list[str]:
        out, caches = place / folder / "run", place / folder / "cache"
        sets = [
            word for key, value in options.items() for word in ("--set", f"{key}={json.dumps(value).strip(chr(34))}")
        ]
        places = ["--data", f"fsdd:{digits}", "--out", str(out), "--cache-dir", str(caches)]
        return ["-m", "layerwise", "run", *places, *sets, *more]

    return build


Launch = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def launch(command: Callable[..., list[str]], place: Path) -> Iterator[Launch]:
    """launch(folder, *more options, ranks=2, restarts=0, python=ForkedPython) starts the command in as many processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def begin(
        folder: str,
        *more: str,
        ranks: int = 2,
        restarts: int = 0,
        python: type[subprocess.Popen] = ForkedPython,
    ) -> subprocess.Popen:
        start = [sys.executable]
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            start += [*torchrun, "--max-restarts", str(restarts), "--monitor-interval", "0.2"]
        return python(
            [*start, *command(folder, *more)],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(starts_ranks, "Popen", ForkedPython)  # in forks of this process
        # For its log alone, torchrun looks for the names of its own functions in all modules: two seconds at each launch.
        patched.setattr(dynamic_rendezvous, "get_method_name", lambda depth=2: "")
        yield begin


def finish(process: subprocess.Popen) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        for pid in [*ranks_of(process), process.pid]:  # the ranks would outlive torchrun
            os.kill(pid, signal.SIGKILL)
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
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_caches_that_two_ranks_write_hold_the_bytes_that_one_process_writes(launch: Launch, place: Path) -> None:
    int8 = ("--cache-dtype", "int8")
    finished(launch("caches", *int8, ranks=1))
    expected = caches(place / "caches")
    assert len(expected) == STAGES
    for cache in (place / "caches" / "cache" / "run").glob("*.h5"):
        cache.unlink()
    finished(launch("caches", *int8))  # the same weights are there: the caches alone are written again
    assert caches(place / "caches") == expected


OFTEN = ("--set", "training.checkpoint_seconds=0", "--max-epochs", "12", "--set", "cache.block=512")


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, place: Path) -> dict[str, bytes]:
    """The bits of two ranks that nobody stopped."""
    finished(launch("undisturbed", *OFTEN))
    return bits(place / "undisturbed")


def test_two_ranks_end_where_one_process_does_and_always_with_the_same_bits(
    launch: Launch, place: Path, undisturbed: dict[str, bytes]
) -> None:
    started = [launch("alone", *OFTEN, ranks=1), launch("first", *OFTEN, python=subprocess.Popen)]
    printed = [finished(process) for process in started][1]
    assert printed.count("stage 1: training") == 1  # one of them tells
    assert bits(place / "first") == undisturbed
    for stage in range(1, STAGES + 1):
        assert losses(place / "first", stage) == pytest.approx(losses(place / "alone", stage), rel=1e-4)
        layouts = []
        for folder in ("alone", "first"):
            with h5py.File(place / folder / "cache" / "run" / f"stage-{stage}.h5") as file:
                activations = file["activations"]
                layouts.append(
                    (activations.shape, activations.dtype, activations.id.get_offset(), file.id.get_filesize())
                )
        assert layouts[0] == layouts[1]


def in_a_stage(run: Path, caches: Path) -> bool:
    return (run / "stages" / "2" / "checkpoint.safetensors").exists()


def in_a_cache(run: Path, caches: Path) -> bool:
    """The second rank has written some of its blocks."""
    return any(journal.stat().st_size >= 4 * 16 for journal in caches.glob("stage-1.h5.journal-*"))


@pytest.mark.parametrize(("when", "rank"), [(in_a_stage, 1), (in_a_cache, 0)])
def test_a_rank_that_is_killed_is_started_again_and_ends_with_the_same_bits(
    launch: Launch, place: Path, undisturbed: dict[str, bytes], when: Callable[[Path, Path], bool], rank: int
) -> None:
    folder = place / f"killed {when.__name__}"
    process = launch(folder.name, *OFTEN, restarts=3)
    wait_for(lambda: when(folder / "run", folder / "cache" / "run"), process)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    printed = finished(process)
    assert ("going on in epoch" in printed) == (when is in_a_stage)
    assert printed.count("samples from fsdd") == 2
    assert bits(folder) == undisturbed


@pytest.mark.parametrize("whom", ["torchrun", "the second rank"])
def test_a_signal_stops_all_ranks_and_the_same_command_goes_on(
    launch: Launch, place: Path, undisturbed: dict[str, bytes], whom: str
) -> None:
    folder = place / f"signal to {whom}"
    process = launch(folder.name, *OFTEN)
    wait_for(lambda: in_a_stage(folder / "run", folder / "cache" / "run"), process)
    os.kill(process.pid if whom == "torchrun" else ranks_of(process)[1], signal.SIGTERM)
    _, err = finish(process)
    assert process.returncode != 0
    assert "layerwise: Stopped by SIGTERM in stage 2" in err
    assert err.count("layerwise: ") == 1
    assert not (folder / "run" / "encoder.safetensors").exists()
    assert "stage 2: going on in epoch" in finished(launch(folder.name, *OFTEN))
    assert bits(folder) == undisturbed


def test_what_ranks_cannot_share_is_refused_in_one_sentence(launch: Launch, place: Path) -> None:
    process = launch("refused", "--rounds", "2")
    _, err = finish(process)
    assert process.returncode != 0
    assert err.count("layerwise: --rounds 2 and 2 processes to a stage do not go together") == 1
    assert "defect" not in err
    assert not (place / "refused").exists()
    foreign = place / "foreign" / "run"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").touch()
    _, err = finish(launch("foreign"))
    assert err.count("holds something else (notes.txt)") == err.count("layerwise: ") == 1
    assert "defect" not in err
    shutil.rmtree(foreign)

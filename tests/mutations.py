"""Puts small defects into a copy of the code, one at a time, and shows which test notices each.

    python tests/mutations.py [--tree .] [--only TEXT] [--seconds 300]

Each defect is tried with the test files that should notice it, up to the first failure; one that none of them notices is
printed as NOT CAUGHT, and the exit code is then 1. The tests run in processes that are forked from this one, which has
imported torch, so a defect takes seconds. See the faults in tests/faults for what kills and full disks do.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401  (imported once, for all processes that are forked)
import pytest
import torch


@dataclass(frozen=True, slots=True)
class Defect:
    """A text of the code that is replaced by another one."""

    what: str
    file: str
    """Below layerwise/."""
    text: str
    """Occurs once in the file."""
    replacement: str
    tests: tuple[str, ...]
    """Files or tests below tests/ that should notice it."""


DEFECTS: list[Defect] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="whose code and tests")
    parser.add_argument("--only", default="", help="defects whose description holds this text")
    parser.add_argument("--seconds", type=float, default=300, help="longest time for the tests of one defect")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [defect for defect in DEFECTS if options.only in defect.what]
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        copy = Path(name) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".hypothesis", "runs", "_build", ".*_cache")
        shutil.copytree(options.tree, copy, ignore=ignored)
        missed = [defect for defect in chosen if not is_caught(defect, copy, options.seconds)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} defects were caught.")
    sys.exit(1 if missed else 0)


def is_caught(defect: Defect, tree: Path, seconds: float) -> bool:
    """Prints a line of the table. Raises ValueError where the text does not occur exactly once."""
    file = tree / "layerwise" / defect.file
    sound = file.read_text()
    if sound.count(defect.text) != 1:
        raise ValueError(f"{defect.file} holds this {sound.count(defect.text)} times: {defect.text}")
    file.write_text(sound.replace(defect.text, defect.replacement))
    started = time.monotonic()
    try:
        noticed = first_failure(tree, defect.tests, seconds)
    finally:
        file.write_text(sound)
    print(f"{defect.what:60} {noticed or 'NOT CAUGHT'} ({time.monotonic() - started:.0f} s)", flush=True)
    return noticed is not None


def first_failure(tree: Path, tests: Sequence[str], seconds: float) -> str | None:
    """The first test of these files that fails, or that does not end in time; None where all of them pass."""
    output = tree.parent / "output.txt"
    child = os.fork()
    if child == 0:
        os._exit(run_tests(tree, tests, output))
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "did not end in time"
        time.sleep(0.05)
    if status == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output.read_text(), re.MULTILINE)
    return failed[1] if failed else f"ended with status {status}: {output.read_text()[-300:]}"


def run_tests(tree: Path, tests: Sequence[str], output: Path) -> int:
    """pytest's exit code, in a process group of its own."""
    os.setsid()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Not the code that this script lies beside.
    sys.path[:] = [str(tree), *(entry for entry in sys.path if not (Path(entry or ".") / "layerwise").is_dir())]
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    with contextlib.suppress(SystemExit):
        folder = f"--basetemp={tree.parent / 'pytest'}"
        return int(pytest.main([*options, folder, *(f"tests/{each}" for each in tests)]))
    return 1


if __name__ == "__main__":
    main()

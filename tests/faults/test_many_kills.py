"""A few of the many kills of many_kills.py."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "1"],
        ["--seed", "2", "--cache", "never"],
        ["--seed", "3", "--keep", "last"],
        ["--seed", "4", "--compression", "zstd"],
    ],
)
def test_runs_that_are_killed_at_random_end_with_the_bits_of_an_undisturbed_one(options: list[str]) -> None:
    # In a process of its own, which forks before it has any threads.
    script = Path(__file__).with_name("many_kills.py")
    done = subprocess.run(
        [sys.executable, str(script), "--runs", "2", *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 with the bits of the undisturbed" in done.stdout

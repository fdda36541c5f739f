"""A few of the many kills of many_kills.py."""

import subprocess
import sys
from pathlib import Path

import pytest
from forked_python import ForkedPython


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
    command = [sys.executable, str(Path(__file__).with_name("many_kills.py")), "--runs", "1", *options]
    process = ForkedPython(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "1 with the bits of the undisturbed" in said

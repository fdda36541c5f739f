"""A few of the many damages of hostile.py."""

import subprocess
import sys
from pathlib import Path

from forked_python import ForkedPython


def test_a_damaged_run_is_mended_or_refused_in_a_sentence_and_nothing_else_is_touched() -> None:
    command = [sys.executable, str(Path(__file__).with_name("hostile.py")), "--short"]
    process = ForkedPython(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said

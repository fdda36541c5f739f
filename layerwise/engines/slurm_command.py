"""Slurm's own commands, which may be missing, and may not answer where its controller is down."""

import subprocess
from collections.abc import Sequence

from layerwise.errors import SlurmError

ANSWER_SECONDS = 60
"""Longest wait for an answer of Slurm's."""


class NoCommand(SlurmError):
    """The command is not on the PATH."""


class NoAnswer(SlurmError):
    """The command has not answered in time; what it was to do may be done or not."""


def ask_slurm(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The command when it has ended, well or not. Raises NoCommand, NoAnswer; callers say what follows from it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        raise NoCommand(f"there is no {command[0]} on the PATH") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} has not answered for {ANSWER_SECONDS} s") from None

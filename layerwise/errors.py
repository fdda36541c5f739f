"""Every error that a person can cause or mend, and the real names that a misspelt one may have meant.

The command line alone turns errors into sentences and exit codes.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class LayerwiseError(Exception):
    """What happened, with the value, and what to do; one or two sentences. Exit code 2."""

    exit_code = 2


class ConfigError(LayerwiseError):
    """An option has an impossible value, or does not fit the run that it is given to."""


class DataError(LayerwiseError):
    """The data set is missing, unreadable or too small."""


class BudgetError(LayerwiseError):
    """The device budget cannot hold what was asked for."""


class CacheError(LayerwiseError):
    """An activation cache is damaged, incomplete, of another version or of another run."""


_MADE_AGAIN = "a run that has its cache there makes it again when it is started"


class UnusableCache(CacheError):
    """What lies at the path is no cache that can be read; in a run, the stage below can make it again."""

    def __init__(self, path: Path, finding: str, remedy: str = _MADE_AGAIN) -> None:
        """finding, remedy: the two halves of the sentence."""
        super().__init__(path, finding, remedy)
        self.path, self.finding, self.remedy = path, finding, remedy

    def __str__(self) -> str:
        return f"{self.finding}; {self.remedy}."


class DamagedCache(UnusableCache):
    """A cache that was sealed no longer holds what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, f"{path} is damaged: {reason}", "delete it and start the run again to rebuild it")
        self.args = (path, reason)  # which it is made of anew in another process


class RunError(LayerwiseError):
    """The run directory cannot be used as asked."""


class UnreadableFile(RunError):
    """What lies at a path is no plain file, too large for what it should hold, or not given by the system."""


class ExportError(LayerwiseError):
    """An encoder cannot be handed over as asked."""


class TrainingError(LayerwiseError):
    """Training went astray, for example to a loss that is not a number."""


class SetupError(LayerwiseError):
    """Something of the installation or of the machine must be mended before a run."""


class SlurmError(LayerwiseError):
    """Slurm cannot be asked, or refuses."""


class Interrupted(LayerwiseError):
    """A signal asked for a stop; everything is saved, and the same command goes on. Exit code 75."""

    exit_code = 75


class OutputLost(LayerwiseError):
    """What a command was to print, and nothing else, could not be written."""


class ReaderGone(LayerwiseError):
    """Whoever read what a command prints has gone, as in `| head`; it ends quietly, with the code of a death by SIGPIPE."""

    exit_code = 141


class ToldElsewhere(LayerwiseError):
    """Another process of the run tells the sentence; this one ends with the same exit code, and quietly."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def near(word: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names that look like the word, the nearest first; upper and lower case are the same."""
    by_lower = {name.lower(): name for name in known}
    return [by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that goes behind a sentence, with a space before it; empty where nothing is near."""
    names = near(word, known)
    return f" Did you mean {' or '.join(names)}?" if names else ""

"""The commands and the Python of the pages: where they stand, and how the tests run them small.

A fenced block is run unless a comment stands right above it that says why not:

    <!-- parsed only: needs a GPU -->

Its commands must still be taken by the command line, options and all.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

SMALL = {
    "net.width": 8,
    "net.context": 0,  # a recurrent layer takes ten times as long to forecast
    "net.kernels": [10, 8, 4, 4, 4, 1],
    "net.strides": [5, 4, 2, 2, 2, 1],
    "net.paddings": [2, 2, 1, 1, 1, 0],
    "data.window": 1280,
    "data.picture": 48,
    "data.crop": 32,
    "net.blocks": [1, 1, 1],
    "objective.steps": 2,
    "objective.anchors": 8,
    "objective.gap": 0,
    "training.max_epochs": 1,
    "training.batch_size": 8,
    "cache.keep": "all",
}
"""The pages show the options that people use. `run`, `plan`, `compare` and `layerwise.resolve` get these on top."""

TWO_ROUNDS = {"training.rounds": 2, "training.max_epochs": 2}
"""In place of any other number of rounds."""

BLOCK = re.compile(
    r"^(?:<!-- parsed only: (?P<why>[^\n]+?) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.S | re.M
)

COMMAND = re.compile(r"^(?:\$ )?(?:srun |torchrun .*?-m )?layerwise (?P<rest>.+)$")
"""A line that somebody types; what stands behind srun or torchrun is a command of ours too."""


@dataclass(frozen=True)
class Snippet:
    """One block of a page."""

    page: str
    line: int
    language: str
    text: str
    parsed_only: str | None
    """Why it is not run; None where it is."""

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of each command of layerwise in it."""
        matches = (COMMAND.match(line) for line in self.text.replace("\\\n", " ").splitlines())
        return [shlex.split(match["rest"], comments=True) for match in matches if match]

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"


def snippets(page: str) -> Iterator[Snippet]:
    """The blocks of a page that hold commands or Python, in their order."""
    content = (ROOT / page).read_text()
    for match in BLOCK.finditer(content):
        line = content.count("\n", 0, match.start("text")) + 1
        snippet = Snippet(page, line, match["language"], match["text"], match["why"])
        if snippet.language == "python" or (snippet.language in ("", "sh", "bash", "console") and snippet.commands):
            yield snippet


def small(command: list[str]) -> list[str]:
    """A command with options under which it takes seconds; later options win."""
    if command[0] not in ("run", "plan", "compare"):
        return command
    options = SMALL | (TWO_ROUNDS if "--rounds" in command else {})
    added = [word for key, value in options.items() for word in ("--set", f"{key}={toml(value)}")]
    return [*command, *added, *(["--seeds", "1"] if command[0] == "compare" else [])]


def toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)

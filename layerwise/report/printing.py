"""All that commands print: lines in which names are shown escaped, tables, and a spinner."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from layerwise import events
from layerwise.screen import printable, refuse_loss

WIDTH_OF_FILES = 140
"""Columns of text where it does not go to a terminal."""


class PlainConsole(Console):
    """A console for which a text is a text: neither markup nor what a terminal would obey."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console_for_results() -> Console:
    """Standard output, wide enough for the tables where it is no terminal."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=WIDTH_OF_FILES)


def say(*parts: RenderableType) -> None:
    """Remarks on what was done, on standard output: each text is a line, all else a table."""
    for part in parts:
        if isinstance(part, str):
            print(printable(part), flush=True)
        else:
            console_for_results().print(part)


def answer(*parts: RenderableType) -> None:
    """The same where it is all that the command is there for. Raises OutputLost or ReaderGone where it is not written."""
    say(*parts)
    refuse_loss(sys.stdout)


def answer_exactly(text: str) -> None:
    """A script, say: text for other programs, to the letter. Raises OutputLost or ReaderGone."""
    print(text, flush=True)
    refuse_loss(sys.stdout)


def answer_json(tree: Any) -> None:
    """One JSON text, in which dataclasses are objects. Raises OutputLost or ReaderGone."""
    answer_exactly(json.dumps(tree, default=asdict))


def remark(line: str) -> None:
    """A line on the standard error output."""
    print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def measuring(doing: str) -> Iterator[events.NotifyProgress]:
    """A bar with the time left on the standard error output where that is a terminal; takes progress and messages."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = PlainConsole(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        bar = shown.add_task(printable(doing), total=None)

        def show(at: events.Progress | events.Message) -> None:
            if isinstance(at, events.Message):
                remark(at.text)
                return
            said = printable(f"{doing}: {at.doing}" if at.doing else doing)
            if at.done < shown.tasks[0].completed:  # another part of the work, at another pace
                shown.reset(bar)
            shown.update(bar, description=said, completed=at.done, total=at.total)

        yield show


@contextmanager
def working(doing: str) -> Iterator[Callable[[str], None]]:
    """A spinner on the standard error output where that is a terminal; gives what changes its text."""
    with PlainConsole(stderr=True).status(Text(printable(doing)), spinner="line") as shown:
        yield lambda text: shown.update(Text(printable(text)))

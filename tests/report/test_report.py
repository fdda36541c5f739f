"""What a person sees: units, lines, and the live table on a terminal."""

import io
import time

import pytest
from rich.console import Console

from layerwise.events import (
    CachingProgress,
    EpochDone,
    Message,
    Progress,
    RunStarted,
    StageDone,
    StageStarted,
    StepDone,
)
from layerwise.report import printing
from layerwise.report.progress import LiveTable, line
from layerwise.units import duration, percent, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (4_000_000_000, "4 GB"),
        (1_234_567, "1.23 MB"),
        (None, "-"),
    ],
)
def test_sizes_are_decimal_and_short(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates_are_percent() -> None:
    assert percent(0.0367) == "3.7 %"


EPOCH = EpochDone(1, 1, 2.0, 0.3, 1.9, 0.4, 12.0, 5_000_000)
DONE = StageDone(1, 8, True, 1.5, 5_000_000, 3_000_000, 0, 40_000_000, 100.0)


def test_lines_say_converged_or_reached_max_epochs() -> None:
    assert "converged (8)" in (line(DONE) or "")
    assert "0 bytes left" in (line(DONE) or "")
    stopped = StageDone(1, 8, False, 1.5, 5, 3, 0, 40, 100.0)
    assert "reached max epochs (8)" in (line(stopped) or "")


def test_steps_do_not_fill_a_log() -> None:
    assert line(StepDone(1, 0, 0, 5, 2.0, 0.1, 10, 20)) is None
    assert line(CachingProgress(1, 5, 10, 1_000_000, 2_000_000)) is None


def test_the_live_table_shows_memory_against_the_budget_and_time_left() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=130, color_system=None)
    with LiveTable(console) as table:
        for event in (
            RunStarted(3, (1,), 8, 4_000_000_000),
            Message("12 files skipped"),
            StageStarted(2, 0, 0),
            StepDone(2, 0, 1, 4, 2.1, 0.2, 1_000_000, 3_000_000),
            EpochDone(2, 1, 2.0, 0.3, 1.9, 0.4, 12.0, 5_000_000),
            StepDone(2, 1, 1, 4, 1.8, 0.25, 1_000_000, 3_000_000),
        ):
            table(event)
    shown = screen.getvalue()
    assert "12 files skipped" in shown
    for text in ("done before", "2/8", "1.8000", "1.9000", "0.250", "1 MB now, peak 3 MB, budget 4 GB", "< 1 min"):
        assert text in shown, text
    assert "pending" in shown


def test_of_stages_that_train_at_once_each_has_its_own_time_left() -> None:
    screen = io.StringIO()
    with LiveTable(Console(file=screen, force_terminal=True, width=130, color_system=None)) as table:
        for event in (
            RunStarted(2, (), 8, None),
            StageStarted(1, 0, 0),
            EpochDone(1, 1, 2.0, 0.3, 1.9, 0.4, 7200.0, 5_000_000),
            StageStarted(2, 0, 0),
            EpochDone(2, 1, 2.0, 0.3, 1.9, 0.4, 600.0, 5_000_000),
            StepDone(1, 1, 1, 4, 1.8, 0.25, 1_000_000, 3_000_000),
            StepDone(2, 1, 1, 4, 1.8, 0.25, 1_000_000, 3_000_000),
        ):
            table(event)
    first, second = (line for line in screen.getvalue().rsplit("time left", 1)[-1].splitlines() if "2/8" in line)
    assert first.rstrip().endswith(f"< {duration(6.5 * 7200)}")
    assert second.rstrip().endswith(f"< {duration(6.5 * 600)}")


def last_bar(screen: io.StringIO) -> str:
    return next(line for line in reversed(screen.getvalue().splitlines()) if "all stages" in line)


def test_a_bar_shows_how_much_of_all_stages_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, now = io.StringIO(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with LiveTable(Console(file=screen, force_terminal=True, width=130, color_system=None)) as table:
        for seconds, event in (
            (0, RunStarted(4, (1,), 8, None)),
            (0, StageStarted(2, 4, 0)),  # half of it was trained by an earlier start
            (600, StepDone(2, 5, 3, 4, 1.8, 0.25, 1_000_000, 3_000_000)),
        ):
            now[0] = seconds
            table(event)
    assert "44%" in last_bar(screen)  # 1.75 of 4 stages, a quarter of one in 10 minutes
    assert f"< {duration(600 * 2.25 / 0.25)} left" in last_bar(screen)


def test_the_bar_is_whole_when_the_last_round_is() -> None:
    screen = io.StringIO()
    with LiveTable(Console(file=screen, force_terminal=True, width=130, color_system=None)) as table:
        table(RunStarted(1, (), 8, None, rounds=2))
        table(StageDone(1, 4, False, 1.5, 5, 3, 0, 40, 100.0, round=1))
        table(StageStarted(1, 4, 0, round=2))
    assert "50%" in last_bar(screen)
    with LiveTable(Console(file=screen, force_terminal=True, width=130, color_system=None)) as table:
        table(RunStarted(1, (), 8, None, rounds=2))
        table(StageDone(1, 8, False, 1.5, 5, 3, 0, 40, 100.0, round=2))
    assert "100%" in last_bar(screen)
    assert "left" not in last_bar(screen)


def test_a_command_shows_how_much_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(printing, "PlainConsole", lambda stderr: Console(file=screen, force_terminal=True, width=100))
    with printing.measuring("probing") as show:
        show(Progress("features", 3, 10))
        show(Progress("classifiers", 1, 4))
    assert "probing: classifiers" in screen.getvalue()
    assert "1/4" in screen.getvalue()


def test_the_live_table_ends_with_what_was_reached() -> None:
    screen = io.StringIO()
    with LiveTable(Console(file=screen, force_terminal=True, width=130, color_system=None)) as table:
        for event in (
            RunStarted(1, (), 8, None),
            StageStarted(1, 0, 0),
            EPOCH,
            CachingProgress(1, 5, 10, 1_000_000, 2_000_000),
            DONE,
        ):
            table(event)
    assert "converged" in screen.getvalue().rsplit("time left", 1)[-1]

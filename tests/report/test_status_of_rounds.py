"""What `layerwise status` says of a run in rounds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from layerwise.commands import layerwise
from layerwise.config import Config
from layerwise.engines.run import run
from layerwise.errors import Interrupted
from layerwise.events import Event, StepDone
from layerwise.stop import StopFlag

Tiny = Callable[..., Config]


def status(out: str | Path, *options: str) -> str:
    result = CliRunner().invoke(layerwise, ["status", str(out), *options], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def stopped_run(tiny_speech: Tiny, digits: Path) -> Config:
    """A run of two rounds that was stopped while stage 3 was trained in the second."""
    config = tiny_speech(f"fsdd:{digits}", **{"training.rounds": 2})
    stop, seen = StopFlag(), 0

    def stop_there(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StepDone)
        if seen == 33:  # of five steps an epoch and stage
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=stop_there)
    return config


def test_every_stage_has_its_round_its_version_and_its_distance(stopped_run: Config) -> None:
    lines = status(stopped_run.out).splitlines()
    rows = [line.split() for line in lines[1:5]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert ["reached max epochs (2)" in line for line in lines[1:5]] == [True, True, False, False]
    assert "training" in lines[3]
    assert "waiting" in lines[4]
    assert ["1 round" in line for line in lines[1:5]] == [False, False, True, True]
    assert lines[-1].startswith("stopped: ")


def test_scripts_are_told_of_every_round(stopped_run: Config) -> None:
    tree = json.loads(status(stopped_run.out, "--json"))
    assert tree["state"] == "stopped"
    assert [each["round"] for each in tree["rounds"]] == [1, 2]
    assert [record["status"] for record in tree["rounds"][0]["stages"]] == ["done"] * 4
    assert tree["rounds"][1]["stages"] == tree["stages"]


def test_whoever_trains_is_named(stopped_run: Config) -> None:
    seen: list[str] = []

    def look(event: Event) -> None:
        if isinstance(event, StepDone) and not seen:
            seen.append(status(stopped_run.out))

    run(stopped_run, notify=look)
    (text,) = seen
    assert "running: " in text
    assert ", process " in text.splitlines()[3]
    assert text.count(", process ") == 1


def test_watching_ends_with_the_run(stopped_run: Config) -> None:
    run(stopped_run)
    text = status(stopped_run.out, "--watch")
    assert text.count("reached max epochs (2)") == 4
    assert "done: " in text


def test_a_comparison_is_pointed_to_its_report(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text("{}")
    result = CliRunner().invoke(layerwise, ["status", str(tmp_path)])
    assert f"layerwise report {tmp_path}" in str(result.exception)

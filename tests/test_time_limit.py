"""--time: how it is written, and what happens when it is nearly over."""

import time
from pathlib import Path

import pytest

from layerwise import config
from layerwise.errors import ConfigError
from layerwise.stop import StopFlag, stop_in_time
from layerwise.units import seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2h", 7200),
        ("1.5 h", 5400),
        ("90min", 5400),
        ("3600s", 3600),
        ("1h 30min", 5400),
        ("1d12h", 129_600),
        ("1:30:00", 5400),
        ("00:00:05", 5),
        ("100:00:00", 360_000),
        ("1-12:00:00", 129_600),
        ("1-12:30", 131_400),
        ("1-12", 129_600),
        (" 2h ", 7200),
    ],
)
def test_times_are_read_as_people_and_slurm_write_them(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "h", "2", "2 hours", "1:30", "1:60:00", "-2h", "0s", "00:00:00", "1.2.3h", "soon"]
)
def test_what_is_no_time_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="is no length of time; write it like 2h"):
        seconds(text)


@pytest.mark.parametrize("value", [3600, "3600", 2.5])
def test_a_number_without_unit_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"--time: .* has no unit; write it like 2h"):
        config.resolve(overrides={"engine.time": value})


def test_a_time_of_day_in_toml_is_a_length(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[engine]\ntime = 01:30:00\n")
    resolved = config.resolve(config_file=tmp_path / "mine.toml")
    assert resolved.engine.time == "01:30:00"
    assert config.parsed(resolved.to_toml()) == resolved


def test_the_time_limit_may_change_between_starts() -> None:
    old, new = config.resolve(), config.resolve(overrides={"engine.time": "2h"})
    assert not config.changed_options(old, new, {"shape", "training"})


def asked_after(flag: StopFlag, longest: float) -> float:
    began = time.monotonic()
    while not flag.reason and time.monotonic() < began + longest:
        time.sleep(0.01)
    return time.monotonic() - began


def test_the_flag_is_set_before_the_time_is_over() -> None:
    flag = StopFlag()
    with stop_in_time(flag, "1s"):
        assert not flag.reason
        assert 0.7 < asked_after(flag, 5) < 1
    assert flag.reason == "--time 1s"


def test_an_earlier_wish_to_stop_keeps_its_reason() -> None:
    flag = StopFlag("SIGINT")
    with stop_in_time(flag, "0.1s"):
        time.sleep(0.3)
    assert flag.reason == "SIGINT"


@pytest.mark.parametrize("limit", [None, "0.2s", "999999999d"])
def test_no_clock_runs_on_without_a_limit_or_after_the_end(limit: str | None) -> None:
    flag = StopFlag()
    with stop_in_time(flag, limit):
        pass
    time.sleep(0.4)
    assert flag.reason is None

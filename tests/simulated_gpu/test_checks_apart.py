"""Checks of `make gpu-check` end within their time, and one that crashes or hangs takes no other along."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import checks
from checks import Check, Findings, NotMeasured, apart, in_turn

# They are pickled, and this module is imported anew where they run.


def keep(shared: Any, findings: Findings) -> None:
    findings.add(True, shared=shared, process=os.getpid())


def break_it(shared: Any, findings: Findings) -> None:
    findings.add(True, kept=1)
    findings.add(False, kept=0)


def crash(shared: Any, findings: Findings) -> None:
    findings.add(True, kept=1)
    raise ValueError("the first line\nadvice")


def die(shared: Any, findings: Findings) -> None:
    os._exit(7)


def hang(shared: Any, findings: Findings) -> None:
    time.sleep(1000)


def go_on_and_on(shared: Any, findings: Findings) -> None:
    while True:
        findings.add(True, kept=1)
        findings.raise_if_over()


def give_up(shared: Any, findings: Findings) -> None:
    findings.add(True, kept=1)
    raise NotMeasured("there is no such thing here")


def figures_alone(shared: Any, findings: Findings) -> None:
    findings.add(None, seconds=1)


def check(measure: Any, seconds: float = 1) -> Check:
    return Check(measure.__name__, "a promise", seconds, measure)


def made() -> str:
    return "what they share"


def test_a_promise_passes_fails_or_is_not_run() -> None:
    measures = keep, break_it, crash, give_up, figures_alone, keep
    outcomes = list(in_turn([check(each) for each in measures], "it", time.time() + 100))
    assert [(each.status, each.why) for each in outcomes] == [
        ("passed", ""),
        ("failed", "not so in 1 of 2 rows"),
        ("failed", "ValueError: the first line"),
        ("not run", "there is no such thing here"),
        ("not run", "there was nothing to judge by"),
        ("passed", ""),
    ]
    assert outcomes[2].traceback.endswith("ValueError: the first line\nadvice\n")


def test_what_is_not_reached_is_not_run() -> None:
    first, second = in_turn([check(go_on_and_on, 1), check(keep, 1000)], "it", time.time() + 20)
    assert (first.status, first.why) == ("not run", "its share of the time was over")
    assert second.status == "passed"
    (never,) = in_turn([check(keep)], "it", time.time())
    assert (never.status, never.why, never.rows) == ("not run", "no time was left", [])


def test_a_process_that_crashes_ends_or_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "GRACE", 0.0)
    measures = [check(keep), check(crash), check(keep), check(die), check(hang, 0.01), check(keep)]
    outcomes = list(apart(measures, made, time.time() + 120))
    assert [each.name for each in outcomes] == [each.name for each in measures]
    assert [each.status for each in outcomes] == ["passed", "failed", "passed", "failed", "not run", "passed"]
    assert outcomes[3].why == "its process ended with exit code 7"
    assert "was killed" in outcomes[4].why
    kept = [each.rows[0] for each in outcomes if each.status == "passed"]
    assert {row["shared"] for row in kept} == {made()}
    assert len({row["process"] for row in kept} | {os.getpid()}) == 4

"""Which signals ask for a stop: those that whoever started the process has not had ignored."""

import os
import signal
from collections.abc import Iterator

import pytest

from layerwise.stop import SIGNALS, stop_on_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Nothing that a test sends can end the tests."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop(number: signal.Signals) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.reason == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_so(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)  # as nohup does, and a shell script for what it starts in the background
    with stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.reason is None
    assert signal.getsignal(number) is signal.SIG_IGN


def test_a_second_one_does_what_it_did_before() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not seen
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]


def test_a_terminal_that_closes_says_so_twice_and_leaves_time_to_save() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, frame: seen.append(number))
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert (stop.reason, seen) == ("SIGHUP", [])

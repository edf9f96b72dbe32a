"""Which signals stop, which do nothing, and that all are as before in the end."""

import os
import signal
from collections.abc import Iterator

import pytest

from worker.cli.signals import Signals


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in signal.Signals}
    yield
    after = {each: signal.getsignal(each) for each in signal.Signals}
    for each, handler in before.items():
        if handler != after[each]:
            signal.signal(each, handler)
    assert after == before


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_signal_that_stops_is_told_by_the_exit_code(number: str) -> None:
    with Signals() as signals:
        signal.raise_signal(signal.Signals[number])
        assert signals.stop.is_set()
        assert signals.exit_code == 128 + signal.Signals[number]


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGUSR2"])
def test_signal_without_a_meaning_stops_nothing(number: str) -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.Signals[number])
        assert (signals.stop.is_set(), signals.exit_code) == (False, 0)


@pytest.mark.parametrize("number", ["SIGHUP", "SIGQUIT"])
def test_signal_that_was_ignored_at_the_start_stays_ignored(number: str) -> None:
    before = signal.signal(signal.Signals[number], signal.SIG_IGN)
    with Signals() as signals:
        signal.raise_signal(signal.Signals[number])
        assert not signals.stop.is_set()
    signal.signal(signal.Signals[number], before)


def test_new_stop_after_a_signal_is_set_at_once() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.new_stop().is_set()

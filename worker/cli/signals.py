"""Signals that stop: the first asks for a clean end, the second ends at once."""

import os
import signal
from collections.abc import Iterable
from threading import Event
from types import FrameType, TracebackType
from typing import Self

_STOPPING = (signal.SIGTERM, signal.SIGINT)
# `nohup` and a shell's background jobs ignore them, and then they stay ignored.
_HANGING_UP = ("SIGHUP", "SIGQUIT", "SIGBREAK")
# By default they would end the process with the lease still held.
_IGNORED = ("SIGUSR1", "SIGUSR2")


def _present(names: Iterable[str]) -> list[signal.Signals]:
    """Give those of these signals that the system has."""
    return [each for each in signal.Signals if each.name in names]


class Signals:
    """While entered, a signal sets `stop`; `exit_code` is then what a shell expects of it."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._stops: list[Event] = []
        self.stop = self.new_stop()

    def new_stop(self) -> Event:
        """Give one more event that a signal sets."""
        stop = Event()
        self._stops.append(stop)
        # Only now: a signal may come between any two lines, and sets those that are listed.
        if self.exit_code:
            stop.set()
        return stop

    def __enter__(self) -> Self:
        heard = [each for each in _present(_HANGING_UP) if signal.getsignal(each) != signal.SIG_IGN]
        self._before = {
            **{each: signal.signal(each, self._handle) for each in [*_STOPPING, *heard]},
            **{each: signal.signal(each, signal.SIG_IGN) for each in _present(_IGNORED)},
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.exit_code:
            os._exit(128 + number)
        self.exit_code = 128 + number
        for stop in self._stops:
            stop.set()

"""SIGTERM and SIGINT: the first asks for a clean end, the second ends at once."""

import os
import signal
from threading import Event
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
        if self.exit_code:
            stop.set()
        return stop

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._handle) for number in _SIGNALS]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in zip(_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.exit_code:
            os._exit(128 + number)
        self.exit_code = 128 + number
        for stop in self._stops:
            stop.set()

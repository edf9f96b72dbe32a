"""The way to a collector, and one line in the log for an outage of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import requests
import structlog

from worker.service.otel.variables import Signal, Wanted

log = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True)
class Outage:
    """Which signals the collector does not take at present; told when the first one fails."""

    _failing: set[Signal] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)

    def ended(self, signal: Signal) -> None:
        with self._lock:
            self._failing.discard(signal)

    def began(self, to: Wanted, error: str) -> None:
        with self._lock:
            news = not self._failing
            self._failing.add(to.signal)
        if news:
            log.warning("telemetry.failed", signal=to.signal, host=to.host, error=error)


class CollectorSession(requests.Session):
    """What one signal is sent through; remembers how its last request ended."""

    def __init__(self, to: Wanted, outage: Outage) -> None:
        super().__init__()
        self._to = to
        self._outage = outage
        self._last = "did not answer yet"

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        try:
            answer = super().send(request, **kwargs)
        except Exception as error:
            self._last = _reason(error)
            raise
        self._last = f"answered with status {answer.status_code}"
        return answer

    def sent(self, export: Callable[[], bool]) -> bool:
        """Return whether the collector took what is exported, retries included; never raise."""
        try:
            taken = export()
        except Exception as error:  # noqa: BLE001  no telemetry is worth an error
            self._last = _reason(error)
            taken = False
        if taken:
            self._outage.ended(self._to.signal)
        else:
            self.given_up()
        return taken

    def given_up(self) -> None:
        """Take in that something was not sent."""
        self._outage.began(self._to, self._last)


def _reason(error: Exception) -> str:
    """Say why there was no answer; the library's own words would quote the address."""
    reason = type(error).__name__
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, OSError) and each.strerror:
            reason = each.strerror
        each = each.__cause__ or each.__context__
    return reason

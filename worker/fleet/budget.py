"""When a request may be sent: all workers together keep to the budget of an API host."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock

import structlog

from worker.errors import Stopped, UsersSyncError
from worker.fleet.control import Control
from worker.sync.api_time import Purpose

log = structlog.stdlib.get_logger(__name__)

# No moment further ahead is promised to what can wait, so that a hint gets one that is nearer.
MOST_AHEAD_SECONDS = 0.5
# A hint takes what there is.
ANY_TIME_SECONDS = 3600.0


# Requests go out somewhat late, now and then: so much of the budget is kept free that those which
# fall together stay within it.
KEPT_RATE = 0.98


class _Batch:
    """Requests that claim their moments together."""

    def __init__(self) -> None:
        self.size = 0
        self.granted: int | None = None
        self.first_at = 0.0


@dataclass(slots=True)
class HostBudget:
    """The requests of this process to one API host, among those of all workers.

    Requests that come while a claim is under way are claimed for together by the next one: the
    busier it is, the fewer statements a request takes.
    """

    control: Control
    host: str
    rate: float
    # This worker's part of the rate, for as long as the control database is away.
    share: Callable[[], float]
    monotonic: Callable[[], float] = time.monotonic
    _batches: dict[bool, _Batch] = field(default_factory=lambda: {True: _Batch(), False: _Batch()})
    _joining: Lock = field(default_factory=Lock)
    _claiming: dict[bool, Lock] = field(default_factory=lambda: {True: Lock(), False: Lock()})
    _alone_at: float = 0.0

    def take_turn(self, purpose: Purpose, stop: Event) -> float:
        """Wait until a request may be sent; returns the seconds. Raises Stopped."""
        began, hinted = self.monotonic(), purpose == "hint"
        while (at := self._moment(hinted=hinted)) is None:
            self._sleep(MOST_AHEAD_SECONDS / 2, stop)
        self._sleep(at - self.monotonic(), stop)
        return self.monotonic() - began

    def _moment(self, *, hinted: bool) -> float | None:
        """Claim a moment, together with who else wants one now. None if all are too far ahead."""
        with self._joining:
            batch = self._batches[hinted]
            place = batch.size
            batch.size += 1
        with self._claiming[hinted]:
            if batch.granted is None:
                with self._joining:
                    self._batches[hinted] = _Batch()
                self._claim(batch, ANY_TIME_SECONDS if hinted else MOST_AHEAD_SECONDS)
        granted = batch.granted or 0
        return batch.first_at + place / self.rate if place < granted else None

    def _claim(self, batch: _Batch, most_ahead: float) -> None:
        try:
            granted, wait = self.control.claim(self.host, batch.size, self.rate, most_ahead)
            batch.first_at = self.monotonic() + wait
        except UsersSyncError as error:
            granted = self._without_control(batch, error)
        batch.granted = granted

    def _without_control(self, batch: _Batch, error: UsersSyncError) -> int:
        """Go on at this worker's own part of the rate: what has begun comes to its end."""
        log.debug("budget.alone", host=self.host, error=str(error))
        now = self.monotonic()
        batch.first_at = max(now, self._alone_at)
        self._alone_at = batch.first_at + batch.size / (self.rate * self.share())
        return batch.size

    @staticmethod
    def _sleep(seconds: float, stop: Event) -> None:
        if stop.wait(max(0.0, seconds)):
            raise Stopped("asked to stop")


@dataclass(slots=True)
class Budget:
    """The budgets of all API hosts, as this worker keeps to them."""

    control: Control
    rate: float
    share: Callable[[], float] = lambda: 1.0
    _hosts: dict[str, HostBudget] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def of(self, host: str) -> HostBudget:
        with self._lock:
            if host not in self._hosts:
                self._hosts[host] = HostBudget(
                    self.control, host, self.rate * KEPT_RATE, self.share
                )
            return self._hosts[host]

"""When a request may be sent: all workers together keep to the budget of an API host."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock

import structlog

from worker.errors import Stopped, UsersSyncError
from worker.fleet.control import Claim, Control
from worker.sync.api_time import Purpose

log = structlog.stdlib.get_logger(__name__)

# No moment further ahead is promised to what can wait, so that a hint gets one that is nearer.
MOST_AHEAD_SECONDS = 0.5
# A hint takes what there is.
ANY_TIME_SECONDS = 3600.0

# Requests that are late fall together with those behind them. So moments are a little further apart
# than the budget asks for: rate + 1 moments span 1 / KEPT_RATE = 1.09 s. Their requests fall into
# one second only if delays differ by more than 0.09 s.
KEPT_RATE = 0.92
# A quarter of that is the worker's, the rest the network's and the server's. A request that misses
# its moment by more lets it go, and claims another one.
LATE_SECONDS = 0.02
# Without the control database a request is not held up by asking it: another one soon is.
ALONE_SECONDS = 3.0


@dataclass(slots=True)
class _Batch:
    """Requests that claim their moments together, which are `apart` seconds from each other."""

    size: int = 0
    granted: int = 0
    first_at: float = 0.0
    apart: float = 0.0
    claimed: Event = field(default_factory=Event)

    def moment(self, place: int) -> float | None:
        """Tell the moment of one of them; None if it was granted none."""
        return self.first_at + place * self.apart if place < self.granted else None


@dataclass(slots=True)
class HostBudget:
    """The requests of this process to one API host, among those of all workers.

    `rate` is the budget, in requests a second. Requests that come while a claim is under way are
    claimed for together by the next one: the busier it is, the fewer statements a request takes.
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
    _alone_until: float = float("-inf")
    # The control database's clock less ours.
    _ahead: float = 0.0

    def take_turn(self, purpose: Purpose, stop: Event) -> float:
        """Wait until a request may be sent; returns the seconds. Raises Stopped."""
        began, hinted = self.monotonic(), purpose == "hint"
        while True:
            at = self._moment(hinted=hinted)
            if at is None:
                self._sleep(MOST_AHEAD_SECONDS / 2, stop)
                continue
            self._sleep(at - self.monotonic(), stop)
            if self.monotonic() - at <= LATE_SECONDS:
                return self.monotonic() - began

    def _moment(self, *, hinted: bool) -> float | None:
        """Claim a moment, together with who else wants one now. None if all are too far ahead."""
        with self._joining:
            batch = self._batches[hinted]
            place = batch.size
            batch.size += 1
        if place:
            batch.claimed.wait()
            return batch.moment(place)
        with self._claiming[hinted]:
            with self._joining:
                self._batches[hinted] = _Batch()
            try:
                self._claim(batch, ANY_TIME_SECONDS if hinted else MOST_AHEAD_SECONDS)
            finally:
                batch.claimed.set()
        return batch.moment(place)

    def _claim(self, batch: _Batch, most_ahead: float) -> None:
        rate, asked_at = self.rate * KEPT_RATE, self.monotonic()
        if asked_at < self._alone_until:
            self._claim_alone(batch)
            return
        try:
            claim = self.control.claim(self.host, batch.size, rate, most_ahead)
        except UsersSyncError as error:
            log.debug("budget.alone", host=self.host, error=str(error))
            self._alone_until = self.monotonic() + ALONE_SECONDS
            self._claim_alone(batch)
        else:
            batch.first_at, batch.apart = self._here(claim, asked_at), 1 / rate
            batch.granted = claim.granted

    def _here(self, claim: Claim, asked_at: float) -> float:
        """Tell a moment of the control database's clock by ours, and never too early.

        How long its answers take differs, and would make requests fall together. The quickest
        answer so far tells best how the clocks differ; it is forgotten when it cannot be true any
        more, since one of them was set.
        """
        least, most = claim.now - self.monotonic(), claim.now - asked_at
        # The true difference lies between the two. A quicker answer has a greater `least`, so this
        # keeps the greatest one; a smaller difference only makes the moment later.
        if not least <= self._ahead <= most:
            self._ahead = least
        return claim.first_at - self._ahead

    def _claim_alone(self, batch: _Batch) -> None:
        """Go on at this worker's own part of the rate: what has begun comes to its end."""
        part = self.rate * self.share()
        # Rounded down: with the delays that KEPT_RATE bears, a worker with 16.7 a second sends 17
        # in some seconds, and three such workers 51 of 50.
        batch.apart = 1 / (KEPT_RATE * (math.floor(part) or part))
        with self._joining:
            batch.first_at = max(self.monotonic(), self._alone_at)
            self._alone_at = batch.first_at + batch.size * batch.apart
        batch.granted = batch.size

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
                self._hosts[host] = HostBudget(self.control, host, self.rate, self.share)
            return self._hosts[host]

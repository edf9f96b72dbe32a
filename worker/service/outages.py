"""What goes wrong at present: told when it begins and when it ends, and tried ever more rarely."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import structlog

from worker.service.health import Health
from worker.service.metrics import Metrics

log = structlog.stdlib.get_logger(__name__)

FIRST_PAUSE_SECONDS = 1.0
# What only a person can fix need not be retried more often.
LONGEST_PAUSE_SECONDS = 60.0
# One failed attempt is a slip, and what is tried again at once loses no time.
LEAST_FAILURES_OF_OUTAGE = 2
# Doubled so often a pause is longer than the longest by far.
MOST_DOUBLINGS = 10


@dataclass(slots=True)
class Outages:
    """The troubles of all threads, by the service or the job that has them.

    Services are watched call by call (`failed`, `succeeded`, `answered`), jobs as a whole (`began`,
    `ended`). It is one trouble until none of them is left. Each name that was told of when it began
    is told of again when it ends. After an outage of a service, `recovered` is called.
    """

    health: Health
    metrics: Metrics
    recovered: Callable[[], None] = lambda: None
    _present: dict[str, tuple[str, bool]] = field(default_factory=dict)
    _told: dict[str, None] = field(default_factory=dict)
    _failures: Counter[str] = field(default_factory=Counter)
    _attempts: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)

    def failed(self, service: str, error: str) -> None:
        """Take in an attempt that failed and will be repeated."""
        self.moved()
        self.metrics.count_retry(service)
        with self._lock:
            self._attempts[service] += 1
        self.began(service, error)

    def succeeded(self, service: str) -> None:
        """Take in a call that succeeded."""
        with self._lock:
            outage = self._attempts.pop(service, 0) >= LEAST_FAILURES_OF_OUTAGE
        self.ended(service)
        if outage:
            self.recovered()

    def answered(self, status: str, seconds: float) -> None:
        """Take in how a request ended, and when."""
        self.moved()
        self.metrics.count_request(status, seconds)

    def took(self, service: str, seconds: float) -> None:
        """Take in how long a call took that succeeded, without the attempts before it."""
        self.metrics.observe_call(service, seconds)

    def moved(self) -> None:
        """Take in that a job got somewhere, be it to an error."""
        self.health.moved()

    def stalled(self) -> bool:
        """Whether the worker makes no progress, and so should not keep the lease."""
        return self.health.stalled()

    def began(self, name: str, error: str, *, fatal: bool = False) -> None:
        """Note what goes wrong, and warn if it is news; only a person can fix what is `fatal`."""
        with self._lock:
            # The newest is the last.
            self._present.pop(name, None)
            self._present[name] = (error, fatal)
            if self.health.trouble(f"{name}: {error}", fatal=fatal):
                self._told[name] = None
                log.warning("trouble.began", service=name, error=error)

    def ended(self, name: str) -> None:
        """Note what goes well again, and tell how long it lasted if nothing goes wrong now."""
        with self._lock:
            self._failures.pop(name, None)
            if self._present.pop(name, None) is None:
                return
            if self._present:
                left = next(reversed(self._present))
                error, fatal = self._present[left]
                self.health.trouble(f"{left}: {error}", fatal=fatal)
            elif (lasted := self.health.trouble_ended()) is not None:
                for told in self._told:
                    log.info("trouble.ended", service=told, lasted_seconds=round(lasted, 1))
                self._told.clear()

    def next_pause(self, name: str) -> float:
        """Give the seconds until the next attempt, more with each failure in a row."""
        with self._lock:
            doublings = min(self._failures[name], MOST_DOUBLINGS)
            self._failures[name] += 1
        pause: float = FIRST_PAUSE_SECONDS * 2**doublings
        return min(pause, LONGEST_PAUSE_SECONDS)
